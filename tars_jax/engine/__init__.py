"""The engine: scheduler and pages (plain Python), the jitted step, and the thread that drives them."""
