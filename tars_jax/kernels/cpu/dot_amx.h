// Products of 16 activation rows by AMX. Those of quantised weights have the bits of `dot.h`'s, which makes them of fewer rows: 8-bit
// products are exact, and what makes numbers of them comes in the same order. Those of bfloat16 are made here for any number of rows.
#pragma once
#include <algorithm>

#include "dot.h"
#include "tile_registers.h"

namespace tars::TARS_ISA {

#if defined(__SANITIZE_ADDRESS__)
#define TARS_EACH_ROW(r) for (int r = 0; r < kPanel; ++r)
#else
#define TARS_EACH_ROW(r) _Pragma("GCC unroll 16") for (int r = 0; r < kPanel; ++r)
#endif

// Whether so many rows are faster here: a panel costs the same whether it is full or not, and one alone does not pay for the unpacking.
inline bool fills_panels(int64_t rows) { return rows > kPanel && 4 * ceil_div(rows, kPanel) * kPanel <= 5 * rows; }

// A block of a quantised tile as AMX takes it, whatever its type: 8 vectors of 16 outputs x 4 signed codes, then scales and minima in
// float32, [halves][16].
template <int kHalves, bool kAffine>
struct PlainBlock {
  static constexpr int kCodeBytes = kLanes * kGroup, kScaleBytes = kHalves * kLanes * 4;
  static constexpr int kBytes = kCodeBytes + kScaleBytes * (1 + kAffine);

  // A pair of steps is one block's halves, or two blocks. Which block and half the pair's step `kStep` is:
  static constexpr int block_of(int step) { return kHalves == 1 ? step : 0; }
  static constexpr int half_of(int step) { return kHalves == 1 ? 0 : step; }
  static constexpr int kPairBlocks = 2 / kHalves;

  template <int kStep>
  TARS_INLINE void multiply(const uint8_t* tile, const ActivationTile* x) {
    load_tile<4 + kStep>(x[block_of(kStep)].codes[0] + half_of(kStep) * kGroup / kHalves, kGroup);
    load_tile<6 + kStep>(tile + block_of(kStep) * kBytes + half_of(kStep) * kCodeBytes / kHalves, 64);
    clear_tile<kStep>();
    multiply_bytes<kStep, 4 + kStep, 6 + kStep>();
  }

  template <int kStep>
  TARS_INLINE void add(const uint8_t* tile, const ActivationTile* x, const int32_t* sums, Floats (&total)[kPanel]) {
    const float* scales = reinterpret_cast<const float*>(tile + block_of(kStep) * kBytes + kCodeBytes) + half_of(kStep) * kLanes;
    const ActivationTile& group = x[block_of(kStep)];
    const Floats scale = load(scales);
    TARS_EACH_ROW(r) total[r] = fma(to_floats(load_ints(sums + r * kLanes)) * splat(group.scale[r]), scale, total[r]);
    if constexpr (kAffine) {
      const Floats min = load(scales + kHalves * kLanes);
      TARS_EACH_ROW(r) total[r] = fma(splat(group.sums[kHalves == 1 ? 0 : 1 + half_of(kStep)][r]), min, total[r]);
    }
  }

  // One step is multiplied while the one before it is stored and the one before that is added.
  TARS_INLINE void rows(const uint8_t* tile, int64_t blocks, const uint8_t* fetch, int lines, const ActivationTile* x, float* out) {
    alignas(64) int32_t sums[2][kPanel * kLanes];
    Floats total[kPanel];
    TARS_EACH_ROW(r) total[r] = splat(0.0f);
    multiply<0>(tile, x);
    multiply<1>(tile, x);
    store_tile<0>(sums[0], 64);
    for (int64_t left = blocks - kPairBlocks; left > 0; left -= kPairBlocks) {
      const uint8_t* next = tile + kPairBlocks * kBytes;
      multiply<0>(next, x + kPairBlocks);
      store_tile<1>(sums[1], 64);
      add<0>(tile, x, sums[0], total);
      multiply<1>(next, x + kPairBlocks);
      store_tile<0>(sums[0], 64);
      add<1>(tile, x, sums[1], total);
      for (int i = 0; i < lines; ++i, fetch += 64) __builtin_prefetch(fetch, 0, 2);
      tile = next;
      x += kPairBlocks;
    }
    store_tile<1>(sums[1], 64);
    add<0>(tile, x, sums[0], total);
    add<1>(tile, x, sums[1], total);
    TARS_EACH_ROW(r) store(out + r * kLanes, total[r]);
  }

  template <int kTiles>
  static void dot(const uint8_t* const* tiles, int64_t blocks, const Ahead& ahead, const Panel& panel, int, float* const* out) {
    const int64_t bytes = blocks * ahead.block_bytes / ahead.turns, pairs = std::max<int64_t>(blocks / kPairBlocks - 1, 1);
    for (int t = 0; t < kTiles; ++t)
      rows(tiles[t], blocks, ahead.tiles[t] + ahead.turn * bytes, static_cast<int>(ceil_div(bytes, 64 * pairs)), panel.tiles, out[t]);
  }
};

// A tile's blocks to plain ones.
template <int kBits, int kWeightGroup, bool kAffine, DType kType>
struct Unpacker {
  using Packed = QuantizedBlock<kBits, kWeightGroup, kAffine, kType>;
  using Plain = PlainBlock<Packed::kHalves, kAffine>;
  static constexpr int kOffset = kBits == 8 ? 128 : kAffine ? 0 : 1 << (kBits - 1);  // of the codes

  TARS_INLINE void put(uint8_t* out, int quad, Ints codes) {
    const __m512i x = _mm512_sub_epi8((__m512i)codes.part[0], _mm512_set1_epi8(static_cast<char>(kOffset)));
    _mm512_store_si512(out + 64 * quad, x);
  }

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, tile += Packed::kBytes, out += Plain::kBytes) {
      TARS_UNROLL for (int v = 0; v < (kBits == 8 ? 8 : kNibbleVectors); ++v) {
        Ints low = load_ints(tile + 64 * v);
        if constexpr (kBits == 8) {
          put(out, v, low);
        } else {
          const int low_at = low_quad(kWeightGroup, v), high_at = high_quad(kWeightGroup, v);
          Ints high = shift_right<4>(low) & splat(0x0f0f0f0f);
          low = low & splat(0x0f0f0f0f);
          if constexpr (kBits > 4) low = low | Packed::high_bits(tile, low_at), high = high | Packed::high_bits(tile, high_at);
          put(out, low_at, low);
          put(out, high_at, high);
        }
      }
      constexpr int kVectors = Packed::kHalves * (1 + kAffine);
      float* scales = reinterpret_cast<float*>(out + Plain::kCodeBytes);
      for (int i = 0; i < kVectors; ++i) store(scales + i * kLanes, load_as(kType, tile + Packed::kCodeBytes + i * Packed::kScaleBytes));
    }
    if (blocks % Plain::kPairBlocks) std::memset(out, 0, Plain::kBytes);
  }
};

// bfloat16: 16 blocks of a tile, which are 32 inputs, make an operand as they lie.
struct PairTile {
  static constexpr int kStep = 16;  // blocks

  template <int kTiles>
  static void dot(const uint8_t* const* tiles, int64_t blocks, const Ahead& ahead, const Panel& panel, int, float* const* out) {
    Fetcher<kTiles> fetcher({{ahead.tiles[0], ahead.tiles[1]}, ahead.block_bytes * kStep, ahead.turn, ahead.turns});
    alignas(64) uint8_t rest[kTiles][64 * kStep];
    const uint32_t* x = panel.pairs;
    clear_tile<0>();
    clear_tile<1>();
    for (int64_t b = 0; b < blocks; b += kStep, x += kStep * kPanel) {
      const uint8_t* at[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        at[t] = tiles[t] + 64 * b;
        if (blocks - b >= kStep) continue;
        std::memset(rest[t], 0, sizeof rest[t]);
        std::memcpy(rest[t], at[t], 64 * (blocks - b));
        at[t] = rest[t];
      }
      fetcher.reached(b / kStep);
      load_tile<4>(x, 64);
      load_tile<6>(at[0], 64);
      multiply_pairs<0, 4, 6>();
      if constexpr (kTiles == 2) {
        load_tile<7>(at[1], 64);
        multiply_pairs<1, 4, 7>();
      }
    }
    store_tile<0>(out[0], 64);
    if constexpr (kTiles == 2) store_tile<1>(out[1], 64);
  }
};

template <int kBits, int kWeightGroup, bool kAffine, DType kType>
constexpr Dot plain() {
  using From = Unpacker<kBits, kWeightGroup, kAffine, kType>;
  return {From::Plain::template dot<1>, From::Plain::template dot<2>, From::unpack, From::Plain::kBytes, kWeightGroup};
}

template <int kBits, int kWeightGroup>
static Dot pick_plain(const Format& w) {
  if (w.affine) return w.dtype == DType::kF16 ? plain<kBits, kWeightGroup, true, DType::kF16>() : plain<kBits, kWeightGroup, true, DType::kF32>();
  return w.dtype == DType::kF16 ? plain<kBits, kWeightGroup, false, DType::kF16>() : plain<kBits, kWeightGroup, false, DType::kF32>();
}

static Dot pick_tiles(const Format& w, bool pairs, int64_t rows) {
  if (pairs) return {PairTile::dot<1>, PairTile::dot<2>, nullptr, 0, 64};
  if (!w.quantized() || !fills_panels(rows)) return pick_dot(w, pairs, rows);
  if (w.bits == 4) return w.group == 32 ? pick_plain<4, 32>(w) : pick_plain<4, 16>(w);
  if (w.bits == 5) return pick_plain<5, 32>(w);
  if (w.bits == 6) return w.dtype == DType::kF16 ? plain<6, 16, false, DType::kF16>() : plain<6, 16, false, DType::kF32>();
  return w.group == 32 ? pick_plain<8, 32>(w) : pick_plain<8, 16>(w);
}

}  // namespace tars::TARS_ISA
