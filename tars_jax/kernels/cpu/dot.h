// One tile of 16 outputs times up to 8 activation rows: the inner loops of every matrix product.
//
// No software prefetch: tiles are read in one direction, and any distance tried (1 to 12 KiB) cost a fifth against the processor's own.
// A row's result does not depend on how many rows run with it: each row has its own accumulator and the groups come in one order.
#pragma once
#include "vec.h"

namespace tars::TARS_ISA {

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#define TARS_MADDUBS
// Keeps an addition where it stands: GCC would do all multiplications of a block first and spill what they give.
TARS_INLINE IntPart here(__m256i a) {
  __asm__ volatile("" : "+x"(a));
  return (IntPart)a;
}
#endif

// acc[o] += sum over j < 4 of codes[o][j] * x[j], where codes are unsigned and x signed bytes.
//
// Without VNNI, AVX2 multiplies and adds in pairs of 16 bits. Of codes below 8 bits some quads fit into these, and `add_pairs` makes them
// whole. Codes of 8 bits would saturate even in one quad: |code - 128| and the sign moved to x do not.
template <int kBits>
TARS_INLINE Ints dot4(Ints acc, Ints codes, const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
#if defined(__AVX512VNNI__)
  acc.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)acc.part[0], (__m512i)codes.part[0], _mm512_set1_epi32(quad));
#elif defined(TARS_MADDUBS)
  const __m256i q = _mm256_set1_epi32(quad);
  TARS_EACH_PART(i) {
    const __m256i c = (__m256i)codes.part[i];
    if constexpr (kBits == 8) {
      const __m256i code = _mm256_xor_si256(c, _mm256_set1_epi8(-128));
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(q, code));
      acc.part[i] = here(_mm256_add_epi32((__m256i)acc.part[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
    } else {
      acc.part[i] = here(_mm256_add_epi16((__m256i)acc.part[i], _mm256_maddubs_epi16(c, q)));
    }
  }
#else
  const Ints byte = splat(255);
  acc = acc + (codes & byte) * splat(x[0]) + (shift_right<8>(codes) & byte) * splat(x[1]);
  acc = acc + (shift_right<16>(codes) & byte) * splat(x[2]) + (shift_right<24>(codes) & byte) * splat(x[3]);
#endif
  return acc;
}

#if defined(TARS_MADDUBS)
constexpr bool kSignedBytes = true;  // `dot4<8>` has removed the offset of 128 itself
// Quads whose pairs fit into 16 bits: each adds at most 2 * (2^bits - 1) * 127. 0: `dot4` sums in 32 bits.
constexpr int quads_in_pairs(int bits) { return bits == 8 ? 0 : 8 >> (bits - 4); }
constexpr int dot_rows(int bits) { return bits == 4 || bits == 8 ? 4 : 2; }
TARS_INLINE Ints add_pairs(Ints acc, Ints pairs) {
  TARS_EACH_PART(i) acc.part[i] += (IntPart)_mm256_madd_epi16((__m256i)pairs.part[i], _mm256_set1_epi16(1));
  return acc;
}
#else
constexpr bool kSignedBytes = false;
constexpr int quads_in_pairs(int) { return 0; }
constexpr int dot_rows(int) { return kRowBlock; }
TARS_INLINE Ints add_pairs(Ints acc, Ints) { return acc; }
#endif

template <int kBits, int kWeightGroup, bool kAffine, DType kType>
struct QuantizedBlock {
  static constexpr int kHalves = kGroup / kWeightGroup;
  static constexpr int kCodeBytes = kLanes * kGroup * kBits / 8;
  static constexpr int kScaleBytes = kLanes * (kType == DType::kF32 ? 4 : 2);
  static constexpr int kBytes = kCodeBytes + kHalves * kScaleBytes * (kAffine ? 2 : 1);
  static constexpr int kVectors = (kBits == 8 ? 8 : kNibbleVectors) / kHalves;  // of codes or their nibbles, per weight group
  static constexpr bool kOffset = kBits == 8 ? !kSignedBytes : !kAffine;
  static constexpr int kPairs = quads_in_pairs(kBits);

  // What an accumulator starts from: minus the code offset times the sum of the activations' codes.
  TARS_INLINE Ints start(const ActivationGroup& x, int half) {
    if constexpr (!kOffset) return splat(0);
    int32_t minus8 = kHalves == 1 ? x.minus8 : half == 0 ? x.minus8_low : x.minus8 - x.minus8_low;
    return shift_left<kBits == 8 ? 4 : kBits - 4>(splat(minus8));
  }

  // The bits above a quad's nibbles, where they belong in its codes.
  TARS_INLINE Ints high_bits(const uint8_t* codes, int quad) {
    const Above at = above(kBits, quad);
    return shift(load_ints(codes + 64 * (kNibbleVectors + at.vector)), 4 - at.shift) & splat(((1 << (kBits - 4)) - 1) * 0x10101010);
  }

  template <int kRows>
  TARS_INLINE void dot_quad(Ints codes, int quad, const ActivationGroup* x, Ints* acc, Ints* pairs) {
    TARS_UNROLL for (int r = 0; r < kRows; ++r) {
      if constexpr (kPairs > 0) pairs[r] = dot4<kBits>(pairs[r], codes, x[r].codes + kQuad * quad);
      else acc[r] = dot4<kBits>(acc[r], codes, x[r].codes + kQuad * quad);
    }
  }

  template <int kRows>
  TARS_INLINE void dot_codes(const uint8_t* codes, int half, const ActivationGroup* x, Ints* acc) {
    Ints pairs[kRows];
    TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = start(x[r], half), pairs[r] = splat(0);
    TARS_UNROLL for (int i = 0; i < kVectors; ++i) {
      const int v = half * kVectors + i;
      Ints c = load_ints(codes + 64 * v);
      if constexpr (kBits == 8) {
        dot_quad<kRows>(c, v, x, acc, pairs);
      } else {
        const int low_at = low_quad(kWeightGroup, v), high_at = high_quad(kWeightGroup, v);
        Ints low = c & splat(0x0f0f0f0f), high = shift_right<4>(c) & splat(0x0f0f0f0f);
        if constexpr (kBits > 4) low = low | high_bits(codes, low_at), high = high | high_bits(codes, high_at);
        dot_quad<kRows>(low, low_at, x, acc, pairs);
        dot_quad<kRows>(high, high_at, x, acc, pairs);
        if constexpr (kPairs > 0) {
          if (2 * (i + 1) % kPairs == 0 || i + 1 == kVectors) {
            TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = add_pairs(acc[r], pairs[r]), pairs[r] = splat(0);
          }
        }
      }
    }
  }

  // The activations' part of what the minima add: the sum over one weight group.
  TARS_INLINE float group_sum(const ActivationGroup& x, int half) {
    if constexpr (kHalves == 1) return x.sum;
    float low = static_cast<float>(x.minus8_low) * -0.125f * x.scale;
    return half == 0 ? low : x.sum - low;
  }

  template <int kRows>
  TARS_INLINE void add_block(const uint8_t* block, const ActivationGroup* x, Floats* total) {
    TARS_UNROLL for (int half = 0; half < kHalves; ++half) {
      Ints acc[kRows];
      dot_codes<kRows>(block, half, x, acc);
      const uint8_t* scales = block + kCodeBytes + half * kScaleBytes;
      Floats scale = load_as(kType, scales);
      TARS_UNROLL for (int r = 0; r < kRows; ++r) total[r] = fma(to_floats(acc[r]) * splat(x[r].scale), scale, total[r]);
      if constexpr (kAffine) {
        Floats min = load_as(kType, scales + kHalves * kScaleBytes);
        TARS_UNROLL for (int r = 0; r < kRows; ++r) total[r] = fma(splat(group_sum(x[r], half)), min, total[r]);
      }
    }
  }

  template <int kRows>
  static void rows(const uint8_t* tile, int64_t blocks, const ActivationGroup* x, float* out) {
    Floats total[kRows];
    for (int r = 0; r < kRows; ++r) total[r] = splat(0.0f);
    for (int64_t g = 0; g < blocks; ++g, tile += kBytes, x += kPanel) {
      add_block<kRows>(tile, x, total);
    }
    for (int r = 0; r < kRows; ++r) store(out + r * kLanes, total[r]);
  }
};

template <DType kType>
struct DenseBlock {
  // Even and odd inputs have their own accumulators: twice the chains for one row.
  template <int kRows>
  static void rows(const uint8_t* tile, int64_t blocks, const float* x, float* out) {
    Floats even[kRows], odd[kRows];
    for (int r = 0; r < kRows; ++r) even[r] = odd[r] = splat(0.0f);
    constexpr int kBytes = 2 * kLanes * (kType == DType::kF32 ? 4 : 2);
    for (int64_t b = 0; b < blocks; ++b, tile += kBytes, x += 2 * kPanel) {
      Floats w0, w1;
      if constexpr (kType == DType::kBF16) {
        Ints pair = load_ints(tile);
        w0 = as_floats(shift_left<16>(pair));
        w1 = as_floats(pair & splat(static_cast<int32_t>(0xffff0000)));
      } else {
        w0 = load_as(kType, tile);
        w1 = load_as(kType, tile + kBytes / 2);
      }
      TARS_UNROLL for (int r = 0; r < kRows; ++r) even[r] = fma(w0, splat(x[r]), even[r]);
      TARS_UNROLL for (int r = 0; r < kRows; ++r) odd[r] = fma(w1, splat(x[kPanel + r]), odd[r]);
    }
    for (int r = 0; r < kRows; ++r) store(out + r * kLanes, even[r] + odd[r]);
  }
};

#if defined(__AVX512F__)
// Compiled for AVX512-BF16, called only where the processor has it.
template <int kRows>
__attribute__((target("avx512bf16"))) static void bf16_rows(const uint8_t* tile, int64_t blocks, const uint32_t* x, float* out) {
  __m512 total[kRows][2];
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  for (int64_t b = 0; b + 2 <= blocks; b += 2, tile += 128, x += 2 * kPanel) {
    __m512bh w0 = (__m512bh)_mm512_loadu_si512(tile), w1 = (__m512bh)_mm512_loadu_si512(tile + 64);
    TARS_UNROLL for (int r = 0; r < kRows; ++r) {
      total[r][0] = _mm512_dpbf16_ps(total[r][0], w0, (__m512bh)_mm512_set1_epi32(x[r]));
      total[r][1] = _mm512_dpbf16_ps(total[r][1], w1, (__m512bh)_mm512_set1_epi32(x[kPanel + r]));
    }
  }
  if (blocks % 2)
    for (int r = 0; r < kRows; ++r)
      total[r][0] = _mm512_dpbf16_ps(total[r][0], (__m512bh)_mm512_loadu_si512(tile), (__m512bh)_mm512_set1_epi32(x[r]));
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * kLanes, _mm512_add_ps(total[r][0], total[r][1]));
}
#endif

// Runs `function` over 0..8 rows of a panel in the row blocks that are compiled: `most` (8, 4 or 2), 4, 2, 1.
#define TARS_ROW_BLOCKS(function, most)                                                      \
  int r = 0;                                                                                 \
  for (; rows - r >= most; r += most) function<most>(tile, blocks, x + r, out + r * kLanes); \
  if constexpr (most > 4) {                                                                  \
    if (rows - r >= 4) {                                                                     \
      function<4>(tile, blocks, x + r, out + r * kLanes);                                    \
      r += 4;                                                                                \
    }                                                                                        \
  }                                                                                          \
  for (; rows - r >= 2; r += 2) function<2>(tile, blocks, x + r, out + r * kLanes);          \
  if (r < rows) function<1>(tile, blocks, x + r, out + r * kLanes);

using DotTile = void (*)(const uint8_t* tile, int64_t blocks, const Panel& panel, int rows, float* out);

template <int kBits, int kWeightGroup, bool kAffine, DType kType>
static void dot_quantized(const uint8_t* tile, int64_t blocks, const Panel& panel, int rows, float* out) {
  using Block = QuantizedBlock<kBits, kWeightGroup, kAffine, kType>;
  const ActivationGroup* x = panel.groups;
  TARS_ROW_BLOCKS(Block::template rows, dot_rows(kBits))
}

template <DType kType>
static void dot_dense(const uint8_t* tile, int64_t blocks, const Panel& panel, int rows, float* out) {
  const float* x = panel.floats;
  TARS_ROW_BLOCKS(DenseBlock<kType>::template rows, kRowBlock)
}

#if defined(__AVX512F__)
static void dot_bf16(const uint8_t* tile, int64_t blocks, const Panel& panel, int rows, float* out) {
  const uint32_t* x = panel.pairs;
  TARS_ROW_BLOCKS(bf16_rows, kRowBlock)
}
#endif

template <int kBits, int kWeightGroup>
static DotTile pick_quantized(const Format& w) {
  if (w.affine)
    return w.dtype == DType::kF16 ? dot_quantized<kBits, kWeightGroup, true, DType::kF16> : dot_quantized<kBits, kWeightGroup, true, DType::kF32>;
  return w.dtype == DType::kF16 ? dot_quantized<kBits, kWeightGroup, false, DType::kF16> : dot_quantized<kBits, kWeightGroup, false, DType::kF32>;
}

static DotTile pick_dot(const Format& w, [[maybe_unused]] bool pairs) {
  if (w.quantized()) {
    if (w.bits == 4) return w.group == 32 ? pick_quantized<4, 32>(w) : pick_quantized<4, 16>(w);
    if (w.bits == 5) return pick_quantized<5, 32>(w);
    if (w.bits == 6) return w.dtype == DType::kF16 ? dot_quantized<6, 16, false, DType::kF16> : dot_quantized<6, 16, false, DType::kF32>;
    return w.group == 32 ? pick_quantized<8, 32>(w) : pick_quantized<8, 16>(w);
  }
#if defined(__AVX512F__)
  if (pairs) return dot_bf16;
#endif
  if (w.dtype == DType::kBF16) return dot_dense<DType::kBF16>;
  return w.dtype == DType::kF16 ? dot_dense<DType::kF16> : dot_dense<DType::kF32>;
}

}  // namespace tars::TARS_ISA
