// Plain C++ for any processor. Linked first: should an inline function of the standard library end up in several of these objects, the
// linker keeps this one, which runs everywhere.
#define TARS_ISA portable
#define TARS_ISA_NAME "portable"
#include "isa_table.h"

namespace tars {
const Kernels& portable_kernels() { return portable::table; }
}  // namespace tars
