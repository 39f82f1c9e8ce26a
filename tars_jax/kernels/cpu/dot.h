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

// acc[o] += sum over j < 4 of codes[o][j] * x[j], where codes are unsigned and x signed bytes. kWide: codes reach 255, otherwise 15.
//
// Without VNNI, AVX2 multiplies and adds in pairs of 16 bits. Of narrow codes the 8 quads of a group fit: 8 * 2 * 15 * 127 < 2^15; the
// pairs are added by `whole` at the end. Wide ones would saturate even in one quad: |code - 128| and the sign moved to x do not.
template <bool kWide>
TARS_INLINE Ints dot4(Ints acc, Ints codes, const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
#if defined(__AVX512VNNI__)
  acc.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)acc.part[0], (__m512i)codes.part[0], _mm512_set1_epi32(quad));
#elif defined(TARS_MADDUBS)
  const __m256i q = _mm256_set1_epi32(quad);
  TARS_EACH_PART(i) {
    const __m256i c = (__m256i)codes.part[i];
    if constexpr (kWide) {
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
constexpr bool kSignedBytes = true;  // `dot4<true>` has removed the offset of 128 itself
constexpr int kDotRows = 4;
#else
constexpr bool kSignedBytes = false;
constexpr int kDotRows = kRowBlock;
#endif

// What `dot4` starts from and what its sums, `start` included, are at the end.
template <bool kWide>
TARS_INLINE Ints first(Ints start) {
#if defined(TARS_MADDUBS)
  if constexpr (!kWide) return splat(0);
#endif
  return start;
}
template <bool kWide>
TARS_INLINE Ints whole(Ints acc, [[maybe_unused]] Ints start) {
#if defined(TARS_MADDUBS)
  if constexpr (!kWide)
    TARS_EACH_PART(i) acc.part[i] = start.part[i] + (IntPart)_mm256_madd_epi16((__m256i)acc.part[i], _mm256_set1_epi16(1));
#endif
  return acc;
}

template <int kBits, int kWeightGroup, bool kAffine, DType kType>
struct QuantizedBlock {
  static constexpr int kHalves = kGroup / kWeightGroup;
  static constexpr int kCodeBytes = kLanes * kGroup * kBits / 8;
  static constexpr int kScaleBytes = kLanes * (kType == DType::kF32 ? 4 : 2);
  static constexpr int kBytes = kCodeBytes + kHalves * kScaleBytes * (kAffine ? 2 : 1);
  static constexpr int kVectors = kCodeBytes / 64 / kHalves;  // of codes, per weight group
  static constexpr bool kOffset = kBits == 4 ? !kAffine : !kSignedBytes;

  // What an accumulator starts from: minus the code offset times the sum of the activations' codes.
  TARS_INLINE Ints start(const ActivationGroup& x, int half) {
    if constexpr (!kOffset) return splat(0);
    int32_t minus8 = kHalves == 1 ? x.minus8 : half == 0 ? x.minus8_low : x.minus8 - x.minus8_low;
    return kBits == 4 ? splat(minus8) : shift_left<4>(splat(minus8));
  }

  template <int kRows>
  TARS_INLINE void dot_codes(const uint8_t* codes, int half, const ActivationGroup* x, Ints* acc) {
    TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = first<kBits == 8>(start(x[r], half));
    TARS_UNROLL for (int i = 0; i < kVectors; ++i) {
      const int v = half * kVectors + i;
      Ints c = load_ints(codes + 64 * v);
      if constexpr (kBits == 8) {
        TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = dot4<true>(acc[r], c, x[r].codes + kQuad * v);
      } else {
        Ints low = c & splat(0x0f0f0f0f), high = shift_right<4>(c) & splat(0x0f0f0f0f);
        const int at = kQuad * low_quad(kWeightGroup, v), then = kQuad * high_quad(kWeightGroup, v);
        TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = dot4<false>(acc[r], low, x[r].codes + at);
        TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = dot4<false>(acc[r], high, x[r].codes + then);
      }
    }
    TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[r] = whole<kBits == 8>(acc[r], start(x[r], half));
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
  TARS_ROW_BLOCKS(Block::template rows, kDotRows)
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
    return w.group == 32 ? pick_quantized<8, 32>(w) : pick_quantized<8, 16>(w);
  }
#if defined(__AVX512F__)
  if (pairs) return dot_bf16;
#endif
  if (w.dtype == DType::kBF16) return dot_dense<DType::kBF16>;
  return w.dtype == DType::kF16 ? dot_dense<DType::kF16> : dot_dense<DType::kF32>;
}

}  // namespace tars::TARS_ISA
