// The eight tile registers of AMX: up to 16 rows of 64 bytes each (Intel, Software Developer's Manual, volume 1, chapter 18).
//
// Compilers have intrinsics for these, but do not tell their optimiser that a load reads what was stored just before.
#pragma once
#include <cstdint>

#include "vec.h"

namespace tars::TARS_ISA {

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Results in registers 0-3; left operands in 4-5, with rows of `inner` bytes, and right ones in 6-7, with inner / 4 rows. 0 gives the
// registers back. The shapes are a thread's own, and others (XLA's matrix library) set them too, so that they are set for each piece of
// work; it costs 80 ns.
static void set_tile_shapes(int inner) {
  if (!inner) {
    __asm__ volatile("tilerelease" ::: "memory");
    return;
  }
  alignas(64) TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.row_bytes[i] = 64;
  config.row_bytes[4] = config.row_bytes[5] = static_cast<uint16_t>(inner);
  config.rows[6] = config.rows[7] = static_cast<uint8_t>(inner / 4);
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

template <int kTile>
TARS_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
TARS_INLINE void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
TARS_INLINE void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// result += left times right, of signed bytes.
template <int kResult, int kLeft, int kRight>
TARS_INLINE void multiply_bytes() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kResult), "i"(kLeft), "i"(kRight));
}
// The same of bfloat16.
template <int kResult, int kLeft, int kRight>
TARS_INLINE void multiply_pairs() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kResult), "i"(kLeft), "i"(kRight));
}

}  // namespace tars::TARS_ISA
