#include <atomic>
#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace tars {
namespace {

// The kernels of that name, null if this build or processor has none.
const Kernels* find(std::string_view name) {
  for (const Kernels* k : {amx_kernels(), avx512_kernels(), avx2_kernels(), &portable_kernels()})
    if (k && name == k->name) return k;
  return nullptr;
}

const Kernels* best() {
  const char* forced = std::getenv("TARS_CPU_ISA");
  if (const Kernels* k = find(forced ? forced : "")) return k;
  for (const Kernels* k : {amx_kernels(), avx512_kernels(), avx2_kernels()})
    if (k) return k;
  return &portable_kernels();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  const Kernels* k = find(name);
  if (k) current().store(k);
  return k != nullptr;
}

}  // namespace tars
