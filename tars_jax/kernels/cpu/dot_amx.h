// Products of 16 activation rows by AMX, of three kinds. Bfloat16 weights: for any number of rows. Quantised weights and rows that are no
// prompt's: 8-bit products, which are exact, and what makes numbers of them comes in the same order as in `dot.h`, which makes them of fewer
// rows; so the bits are the same. Quantised weights and a prompt's rows: the weights as bfloat16, for any number of rows. That takes a third
// of the time for many and is closer to the weights, but for a single row the way to bfloat16 takes longer than reading them from memory.
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

struct Neighbours {  // 0, 16, 1, 17, ...
  uint16_t index[2 * kLanes] = {};
  constexpr Neighbours() {
    for (int i = 0; i < 2 * kLanes; ++i) index[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes);
  }
};
alignas(64) constexpr Neighbours kNeighbours;

constexpr int kPairBytes = 2 * kLanes * kGroup;  // of 32 inputs and 16 outputs in bfloat16

// Whether so many rows are faster in 8-bit products here: a panel costs the same whether it is full or not, and one alone does not pay for the unpacking.
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
  static void dot(const uint8_t* const* tiles, int64_t, int64_t blocks, const Ahead& ahead, const Panel& panel, int, float* const* out) {
    const int64_t bytes = blocks * ahead.block_bytes / ahead.turns, pairs = std::max<int64_t>(blocks / kPairBlocks - 1, 1);
    for (int t = 0; t < kTiles; ++t)
      rows(tiles[t], blocks, ahead.tiles[t] + ahead.turn * bytes, static_cast<int>(ceil_div(bytes, 64 * pairs)), panel.tiles, out[t]);
  }
};

// Bfloat16 of two inputs' weights, those of an output side by side.
TARS_INLINE void store_neighbours(uint8_t* out, Floats first, Floats second) {
  const Ints order = load_ints(kNeighbours.index);
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second.part[0], (__m512)first.part[0]);
  _mm512_store_si512(out, _mm512_permutexvar_epi16((__m512i)order.part[0], (__m512i)both));
}

// The blocks of a quantised tile: what brings them into the forms above and below.
template <int kBits, int kWeightGroup, bool kAffine, DType kType>
struct Unpacker {
  using Packed = QuantizedBlock<kBits, kWeightGroup, kAffine, kType>;
  using Plain = PlainBlock<Packed::kHalves, kAffine>;
  static constexpr int kOffset = kBits == 8 ? 128 : kAffine ? 0 : 1 << (kBits - 1);  // of the codes

  // put(quad, codes): unsigned, 16 outputs x 4.
  template <class Put>
  TARS_INLINE void each_quad(const uint8_t* block, Put put) {
    TARS_UNROLL for (int v = 0; v < (kBits == 8 ? 8 : kNibbleVectors); ++v) {
      Ints low = load_ints(block + 64 * v);
      if constexpr (kBits == 8) {
        put(v, low);
      } else {
        const int low_at = low_quad(kWeightGroup, v), high_at = high_quad(kWeightGroup, v);
        Ints high = shift_right<4>(low) & splat(0x0f0f0f0f);
        low = low & splat(0x0f0f0f0f);
        if constexpr (kBits > 4) low = low | Packed::high_bits(block, low_at), high = high | Packed::high_bits(block, high_at);
        put(low_at, low);
        put(high_at, high);
      }
    }
  }

  TARS_INLINE Floats scale(const uint8_t* block, int i) { return load_as(kType, block + Packed::kCodeBytes + i * Packed::kScaleBytes); }

  static void to_plain(const uint8_t* tile, int64_t blocks, uint8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, tile += Packed::kBytes, out += Plain::kBytes) {
      each_quad(tile, [out](int quad, Ints codes) {
        const __m512i x = _mm512_sub_epi8((__m512i)codes.part[0], _mm512_set1_epi8(static_cast<char>(kOffset)));
        _mm512_store_si512(out + 64 * quad, x);
      });
      constexpr int kVectors = Packed::kHalves * (1 + kAffine);
      float* scales = reinterpret_cast<float*>(out + Plain::kCodeBytes);
      for (int i = 0; i < kVectors; ++i) store(scales + i * kLanes, scale(tile, i));
    }
    if (blocks % Plain::kPairBlocks) std::memset(out, 0, Plain::kBytes);
  }

  // Of one of a quad's inputs, for 16 outputs.
  template <int kByte>
  TARS_INLINE Floats weights(Ints codes, Floats scale, Floats min) {
    constexpr int kZero = static_cast<int>(0x80808000);  // bytes that become 0
    const __m128i lane = _mm_setr_epi32(kZero | kByte, kZero | (4 + kByte), kZero | (8 + kByte), kZero | (12 + kByte));
    const __m512i code = _mm512_shuffle_epi8((__m512i)codes.part[0], _mm512_broadcast_i32x4(lane));
    return fma(to_floats(Ints{{(IntPart)code}}), scale, min);
  }

  // As bfloat16, 1 KB a block.
  static void to_pairs(const uint8_t* tile, int64_t blocks, uint8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, tile += Packed::kBytes, out += kPairBytes) {
      Floats scales[Packed::kHalves], mins[Packed::kHalves];
      for (int i = 0; i < Packed::kHalves; ++i) {
        scales[i] = scale(tile, i);
        mins[i] = splat(static_cast<float>(-kOffset)) * scales[i];
        if constexpr (kAffine) mins[i] = mins[i] + scale(tile, Packed::kHalves + i);
      }
      each_quad(tile, [&](int quad, Ints codes) {
        const int half = quad * kQuad / kWeightGroup;
        const Floats s = scales[half], m = mins[half];
        store_neighbours(out + 128 * quad, weights<0>(codes, s, m), weights<1>(codes, s, m));
        store_neighbours(out + 128 * quad + 64, weights<2>(codes, s, m), weights<3>(codes, s, m));
      });
    }
  }
};

// bfloat16: pairs of 32 inputs make an operand as they lie. A dense tile's are 16 of its blocks, an unpacked one's a block.
//
// Of 384 inputs a panel's 12 KB and two tiles' 24 KB stay in the first-level cache: 8 ns a product, 11.6 with all inputs at once. Two panels
// and two tiles at once take as long as that; but at times (a neighbour on the same core?) the processor does tile instructions much
// slower, the more so the more registers are in use: then that takes 30 ns, and this 15.
template <int kStep>
struct PairTile {
  static constexpr int64_t kStretch = 384;

  template <int kTiles>
  static void dot(const uint8_t* const* tiles, int64_t first, int64_t blocks, const Ahead& ahead, const Panel& panel, int, float* const* out) {
    constexpr int kBlockBytes = kPairBytes / kStep;
    Fetcher<kTiles> fetcher({{ahead.tiles[0], ahead.tiles[1]}, ahead.block_bytes * kStep, ahead.turn, ahead.turns});
    alignas(64) uint8_t rest[kTiles][kPairBytes];
    const uint32_t* x = panel.pairs + first / kStep * (kPairBytes / 4);
    begin<0>(first, out[0]);
    if constexpr (kTiles == 2) begin<1>(first, out[1]);
    for (int64_t b = 0; b < blocks; b += kStep, x += kPairBytes / 4) {
      const uint8_t* at[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        at[t] = tiles[t] + kBlockBytes * b;
        if (blocks - b >= kStep) continue;
        std::memset(rest[t], 0, sizeof rest[t]);
        std::memcpy(rest[t], at[t], kBlockBytes * (blocks - b));
        at[t] = rest[t];
      }
      fetcher.reached(b / kStep);
      load_tile<4>(x, 64);
      load_tile<6>(at[0], 64);
      multiply_pairs<0, 4, 6>();
      if constexpr (kTiles == 2) {
        load_tile<6>(at[1], 64);
        multiply_pairs<1, 4, 6>();
      }
    }
    store_tile<0>(out[0], 64);
    if constexpr (kTiles == 2) store_tile<1>(out[1], 64);
  }

 private:
  template <int kTile>
  TARS_INLINE void begin(int64_t first, const float* sums) {
    if (first) load_tile<kTile>(sums, 64);
    else clear_tile<kTile>();
  }
};

template <int kBits, int kWeightGroup, bool kAffine, DType kType>
static Dot unpacked(bool prompts) {
  using From = Unpacker<kBits, kWeightGroup, kAffine, kType>;
  using Plain = typename From::Plain;
  if (prompts) return {Form::kPairs, PairTile<1>::dot<1>, PairTile<1>::dot<2>, From::to_pairs, kPairBytes, 64, PairTile<1>::kStretch};
  return {Form::kTiles, Plain::template dot<1>, Plain::template dot<2>, From::to_plain, Plain::kBytes, kWeightGroup};
}

template <int kBits, int kWeightGroup>
static Dot pick_unpacked(const Format& w, bool prompts) {
  const bool half = w.dtype == DType::kF16;
  if (w.affine) return half ? unpacked<kBits, kWeightGroup, true, DType::kF16>(prompts) : unpacked<kBits, kWeightGroup, true, DType::kF32>(prompts);
  return half ? unpacked<kBits, kWeightGroup, false, DType::kF16>(prompts) : unpacked<kBits, kWeightGroup, false, DType::kF32>(prompts);
}

static Dot pick_tiles(const Format& w, int64_t rows, bool prompts) {
  if (!w.quantized() && w.dtype == DType::kBF16) return {Form::kPairs, PairTile<16>::dot<1>, PairTile<16>::dot<2>, nullptr, 0, 64, PairTile<16>::kStretch};
  if (!w.quantized() || !(prompts || fills_panels(rows))) return pick_dot(w, rows, prompts);
  if (w.bits == 4) return w.group == 32 ? pick_unpacked<4, 32>(w, prompts) : pick_unpacked<4, 16>(w, prompts);
  if (w.bits == 5) return pick_unpacked<5, 32>(w, prompts);
  if (w.bits == 6) return w.dtype == DType::kF16 ? unpacked<6, 16, false, DType::kF16>(prompts) : unpacked<6, 16, false, DType::kF32>(prompts);
  return w.group == 32 ? pick_unpacked<8, 32>(w, prompts) : pick_unpacked<8, 16>(w, prompts);
}

}  // namespace tars::TARS_ISA
