// AMX beside AVX512 with VNNI and BF16; compiled with -mamx-{tile,int8,bf16} and the flags of isa_avx512.cc.
#include "kernels.h"

#if defined(__AMX_INT8__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARS_ISA amx
#define TARS_ISA_NAME "amx"
#define TARS_PANEL 16
#include "isa_table.h"

namespace tars {
namespace {

// Linux wants to be asked, once for all threads, before the registers are used: a signal's frame grows by 8 KB with them.
bool allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool has_amx() {
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, TILE, INT8
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  return avx512_kernels() && __builtin_cpu_supports("avx512bf16") && allowed();
}

}  // namespace

const Kernels* amx_kernels() {
  static const bool usable = has_amx();
  return usable ? &amx::table : nullptr;
}
}  // namespace tars

#else
namespace tars {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace tars
#endif
