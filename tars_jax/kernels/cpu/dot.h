// One or two tiles of 16 outputs times up to 8 activation rows: the inner loops of every matrix product.
//
// Two tiles share the reads of the activations: with 512-bit registers these, and not the multiplications, would set the pace.
// One row reads memory as fast as the processor's own prefetcher lets it, and software prefetch costs it a fifth; several rows compute for
// longer than that prefetcher looks ahead, and fetch the tiles that come next themselves, into the second-level cache: what waits for
// memory in the first level is what the loops wait for.
// A row's result does not depend on how many rows run with it: each row has its own accumulator and the groups come in one order.
#pragma once
#include "rows.h"

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

constexpr int kFetchingRows = 4;

// Fetches this turn's blocks, at their time.
template <int kTiles>
class Fetcher {
 public:
  __attribute__((always_inline)) explicit Fetcher(const Ahead& ahead) : ahead_(ahead), next_(ahead.turn) {}
  __attribute__((always_inline)) void reached(int64_t block) {
    if (block != next_) return;
    for (int t = 0; t < kTiles; ++t)
      for (int64_t at = block * ahead_.block_bytes, end = at + ahead_.block_bytes; at < end; at += 64) __builtin_prefetch(ahead_.tiles[t] + at, 0, 2);
    next_ += ahead_.turns;
  }

 private:
  const Ahead ahead_;
  int64_t next_;
};

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

  template <int kTiles, int kRows>
  TARS_INLINE void dot_quad(const Ints* codes, int quad, const ActivationGroup* x, Ints (*acc)[kRows], Ints (*pairs)[kRows]) {
    TARS_UNROLL for (int r = 0; r < kRows; ++r) {
      TARS_UNROLL for (int t = 0; t < kTiles; ++t) {
        if constexpr (kPairs > 0) pairs[t][r] = dot4<kBits>(pairs[t][r], codes[t], x[r].codes + kQuad * quad);
        else acc[t][r] = dot4<kBits>(acc[t][r], codes[t], x[r].codes + kQuad * quad);
      }
    }
  }

  template <int kTiles, int kRows>
  TARS_INLINE void dot_codes(const uint8_t* const* tiles, int64_t at, int half, const ActivationGroup* x, Ints (*acc)[kRows]) {
    Ints pairs[kTiles][kRows];
    TARS_UNROLL for (int t = 0; t < kTiles; ++t)
      TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[t][r] = start(x[r], half), pairs[t][r] = splat(0);
    TARS_UNROLL for (int i = 0; i < kVectors; ++i) {
      const int v = half * kVectors + i;
      Ints low[kTiles], high[kTiles];
      TARS_UNROLL for (int t = 0; t < kTiles; ++t) low[t] = load_ints(tiles[t] + at + 64 * v);
      if constexpr (kBits == 8) {
        dot_quad<kTiles, kRows>(low, v, x, acc, pairs);
      } else {
        const int low_at = low_quad(kWeightGroup, v), high_at = high_quad(kWeightGroup, v);
        TARS_UNROLL for (int t = 0; t < kTiles; ++t) {
          high[t] = shift_right<4>(low[t]) & splat(0x0f0f0f0f), low[t] = low[t] & splat(0x0f0f0f0f);
          if constexpr (kBits > 4) low[t] = low[t] | high_bits(tiles[t] + at, low_at), high[t] = high[t] | high_bits(tiles[t] + at, high_at);
        }
        dot_quad<kTiles, kRows>(low, low_at, x, acc, pairs);
        dot_quad<kTiles, kRows>(high, high_at, x, acc, pairs);
        if constexpr (kPairs > 0) {
          if (2 * (i + 1) % kPairs == 0 || i + 1 == kVectors) {
            TARS_UNROLL for (int t = 0; t < kTiles; ++t)
              TARS_UNROLL for (int r = 0; r < kRows; ++r) acc[t][r] = add_pairs(acc[t][r], pairs[t][r]), pairs[t][r] = splat(0);
          }
        }
      }
    }
  }

  template <int kTiles, int kRows>
  TARS_INLINE void add_block(const uint8_t* const* tiles, int64_t at, const ActivationGroup* x, Floats (*total)[kRows]) {
    TARS_UNROLL for (int half = 0; half < kHalves; ++half) {
      Ints acc[kTiles][kRows];
      dot_codes<kTiles, kRows>(tiles, at, half, x, acc);
      TARS_UNROLL for (int t = 0; t < kTiles; ++t) {
        const uint8_t* scales = tiles[t] + at + kCodeBytes + half * kScaleBytes;
        Floats scale = load_as(kType, scales);
        TARS_UNROLL for (int r = 0; r < kRows; ++r) total[t][r] = fma(to_floats(acc[t][r]) * splat(x[r].scale), scale, total[t][r]);
        if constexpr (kAffine) {
          Floats min = load_as(kType, scales + kHalves * kScaleBytes);
          TARS_UNROLL for (int r = 0; r < kRows; ++r) total[t][r] = fma(splat(group_sum<kHalves>(x[r], half)), min, total[t][r]);
        }
      }
    }
  }

  template <int kTiles, int kRows>
  static void rows(const uint8_t* const* tiles, int64_t blocks, const Ahead& ahead, const ActivationGroup* x, float* const* out) {
    Floats total[kTiles][kRows];
    TARS_UNROLL for (int t = 0; t < kTiles; ++t)
      TARS_UNROLL for (int r = 0; r < kRows; ++r) total[t][r] = splat(0.0f);
    Fetcher<kTiles> fetcher({{ahead.tiles[0], ahead.tiles[1]}, kBytes, ahead.turn, ahead.turns});
    for (int64_t block = 0, at = 0; block < blocks; ++block, at += kBytes, x += kPanel) {
      if constexpr (kRows >= kFetchingRows) fetcher.reached(block);
      add_block<kTiles, kRows>(tiles, at, x, total);
    }
    TARS_UNROLL for (int t = 0; t < kTiles; ++t)
      TARS_UNROLL for (int r = 0; r < kRows; ++r) store(out[t] + r * kLanes, total[t][r]);
  }
};

template <DType kType>
struct DenseBlock {
  static constexpr int kBytes = 2 * kLanes * (kType == DType::kF32 ? 4 : 2);

  // Even and odd inputs have their own accumulators: twice the chains for one row.
  template <int kTiles, int kRows>
  static void rows(const uint8_t* const* tiles, int64_t blocks, const Ahead& ahead, const float* x, float* const* out) {
    Floats even[kTiles][kRows], odd[kTiles][kRows];
    TARS_UNROLL for (int t = 0; t < kTiles; ++t)
      TARS_UNROLL for (int r = 0; r < kRows; ++r) even[t][r] = odd[t][r] = splat(0.0f);
    Fetcher<kTiles> fetcher({{ahead.tiles[0], ahead.tiles[1]}, kBytes, ahead.turn, ahead.turns});
    for (int64_t block = 0, at = 0; block < blocks; ++block, at += kBytes, x += 2 * kPanel) {
      if constexpr (kRows >= kFetchingRows) fetcher.reached(block);
      TARS_UNROLL for (int t = 0; t < kTiles; ++t) {
        const uint8_t* place = tiles[t] + at;
        Floats w0, w1;
        if constexpr (kType == DType::kBF16) {
          Ints pair = load_ints(place);
          w0 = as_floats(shift_left<16>(pair));
          w1 = as_floats(pair & splat(static_cast<int32_t>(0xffff0000)));
        } else {
          w0 = load_as(kType, place);
          w1 = load_as(kType, place + kBytes / 2);
        }
        TARS_UNROLL for (int r = 0; r < kRows; ++r) even[t][r] = fma(w0, splat(x[r]), even[t][r]);
        TARS_UNROLL for (int r = 0; r < kRows; ++r) odd[t][r] = fma(w1, splat(x[kPanel + r]), odd[t][r]);
      }
    }
    TARS_UNROLL for (int t = 0; t < kTiles; ++t)
      TARS_UNROLL for (int r = 0; r < kRows; ++r) store(out[t] + r * kLanes, even[t][r] + odd[t][r]);
  }
};

#if defined(__AVX512F__)
// Compiled for AVX512-BF16, called only where the processor has it.
struct PairBlock {
  static constexpr int kBytes = 64;

  template <int kTiles, int kRows>
  __attribute__((target("avx512bf16"))) static void rows(const uint8_t* const* tiles, int64_t blocks, const Ahead& ahead, const uint32_t* x,
                                                         float* const* out) {
    __m512 total[kTiles][kRows];
    TARS_UNROLL for (int t = 0; t < kTiles; ++t)
      TARS_UNROLL for (int r = 0; r < kRows; ++r) total[t][r] = _mm512_setzero_ps();
    Fetcher<kTiles> fetcher({{ahead.tiles[0], ahead.tiles[1]}, kBytes, ahead.turn, ahead.turns});
    for (int64_t block = 0, at = 0; block < blocks; ++block, at += kBytes, x += kPanel) {
      if constexpr (kRows >= kFetchingRows) fetcher.reached(block);
      __m512bh w[kTiles];
      TARS_UNROLL for (int t = 0; t < kTiles; ++t) w[t] = (__m512bh)_mm512_loadu_si512(tiles[t] + at);
      TARS_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[r]);
        TARS_UNROLL for (int t = 0; t < kTiles; ++t) total[t][r] = _mm512_dpbf16_ps(total[t][r], w[t], pair);
      }
    }
    TARS_UNROLL for (int t = 0; t < kTiles; ++t)
      TARS_UNROLL for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out[t] + r * kLanes, total[t][r]);
  }
};
#endif

using Dot = Kernels::Dot;

// Runs a block's loop over the 0..8 rows of a panel, `kMost` (8, 4 or 2), then 4, 2, 1 at a time.
template <class Block, int kTiles, int kMost, class X>
TARS_INLINE void row_by_row(const uint8_t* const* tiles, int64_t blocks, const Ahead& ahead, const X* x, int rows, float* const* out) {
  const int64_t parts = ceil_div(rows, kMost);
  const auto run = [&](auto function, int r) {
    float* at[kTiles];
    for (int t = 0; t < kTiles; ++t) at[t] = out[t] + r * kLanes;
    function(tiles, blocks, {{ahead.tiles[0], ahead.tiles[1]}, ahead.block_bytes, ahead.turn * parts + r / kMost, ahead.turns * parts}, x + r, at);
  };
  int r = 0;
  for (; rows - r >= kMost; r += kMost) run(Block::template rows<kTiles, kMost>, r);
  if constexpr (kMost > 4)
    for (; rows - r >= 4; r += 4) run(Block::template rows<kTiles, 4>, r);
  for (; rows - r >= 2; r += 2) run(Block::template rows<kTiles, 2>, r);
  if (r < rows) run(Block::template rows<kTiles, 1>, r);
}

template <class Block, int kTiles, int kMost, auto kPart>
static void dot(const uint8_t* const* tiles, int64_t, int64_t blocks, const Ahead& ahead, const Panel& panel, int rows, float* const* out) {
  row_by_row<Block, kTiles, kMost>(tiles, blocks, ahead, panel.*kPart, rows, out);
}

template <class Block, int kMost, Form kForm, auto kPart>
constexpr Dot dots() {
#if defined(__AVX512F__)
  return {kForm, dot<Block, 1, kMost, kPart>, dot<Block, 2, kMost / 2, kPart>};
#else
  return {kForm, dot<Block, 1, kMost, kPart>, nullptr};
#endif
}

template <int kBits, int kWeightGroup, bool kAffine, DType kType>
constexpr Dot quantized() {
  return dots<QuantizedBlock<kBits, kWeightGroup, kAffine, kType>, dot_rows(kBits), Form::kGroups, &Panel::groups>();
}

template <DType kType>
constexpr Dot dense() {
  return dots<DenseBlock<kType>, kRowBlock, Form::kFloats, &Panel::floats>();
}

template <int kBits, int kWeightGroup>
static Dot pick_quantized(const Format& w) {
  if (w.affine) return w.dtype == DType::kF16 ? quantized<kBits, kWeightGroup, true, DType::kF16>() : quantized<kBits, kWeightGroup, true, DType::kF32>();
  return w.dtype == DType::kF16 ? quantized<kBits, kWeightGroup, false, DType::kF16>() : quantized<kBits, kWeightGroup, false, DType::kF32>();
}

static Dot pick_dot(const Format& w, int64_t, bool) {
  if (w.quantized()) {
    if (w.bits == 4) return w.group == 32 ? pick_quantized<4, 32>(w) : pick_quantized<4, 16>(w);
    if (w.bits == 5) return pick_quantized<5, 32>(w);
    if (w.bits == 6) return w.dtype == DType::kF16 ? quantized<6, 16, false, DType::kF16>() : quantized<6, 16, false, DType::kF32>();
    return w.group == 32 ? pick_quantized<8, 32>(w) : pick_quantized<8, 16>(w);
  }
#if defined(__AVX512F__)
  if (w.dtype == DType::kBF16 && has_pairs()) return {Form::kPairs, dot<PairBlock, 1, kRowBlock, &Panel::pairs>, dot<PairBlock, 2, kRowBlock, &Panel::pairs>};
#endif
  if (w.dtype == DType::kBF16) return dense<DType::kBF16>();
  return w.dtype == DType::kF16 ? dense<DType::kF16>() : dense<DType::kF32>();
}

}  // namespace tars::TARS_ISA
