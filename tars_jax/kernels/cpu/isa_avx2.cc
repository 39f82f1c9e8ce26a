// AVX2 with FMA and F16C; compiled with -mavx2 -mfma -mf16c.
#include "kernels.h"

#if defined(__AVX2__)
#define TARS_ISA avx2
#define TARS_ISA_NAME "avx2"
#include "isa_table.h"
#endif

namespace tars {
const Kernels* avx2_kernels() {
#if defined(__AVX2__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &avx2::table;
#endif
  return nullptr;
}
}  // namespace tars
