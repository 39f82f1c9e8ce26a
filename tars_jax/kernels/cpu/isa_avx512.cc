// AVX512 with VNNI; compiled with -mavx512{f,bw,dq,vl,vnni}. Functions that need AVX512-BF16 say so themselves.
#include "kernels.h"

#if defined(__AVX512VNNI__)
#define TARS_ISA avx512
#define TARS_ISA_NAME "avx512"
#include "isa_table.h"
#endif

namespace tars {
const Kernels* avx512_kernels() {
#if defined(__AVX512VNNI__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    return &avx512::table;
#endif
  return nullptr;
}
}  // namespace tars
