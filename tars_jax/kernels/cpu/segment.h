// What both shapes of attention share (`attend.h`): cached vectors, the tokens of a segment, and how two softmaxes become one.
#pragma once
#include "kernels.h"
#include "rows.h"

namespace tars::TARS_ISA {

constexpr float kMasked = -1e30f;  // finite, so that a fully masked segment gives exp(0) * 0 and not NaN
constexpr float kLeastTotal = 1e-30f;  // a query that sees nothing gives zeros

TARS_INLINE int64_t padded_dim(const AttentionTask& t) { return ceil_div(t.head_dim, kLanes) * kLanes; }

TARS_INLINE const char* cached(const AttentionTask& t, const void* pages, int64_t token) {
  const int64_t index = t.page_shift >= 0 ? token >> t.page_shift : token / t.page;
  const int64_t slot = (t.table[index] * t.kv_heads + t.kv_head) * t.page + token - index * t.page;
  return static_cast<const char*>(pages) + slot * cache_bytes(t.cache_type, t.head_dim);
}

TARS_INLINE Floats softcap(Floats x, float cap) { return cap > 0 ? splat(cap) * tanh(x / splat(cap)) : x; }

// Up to 16 numbers of a cached vector from dimension `d`, of which `left` remain; the rest is zero.
template <DType kType>
TARS_INLINE Floats load_cached(const char* vector, int64_t d, int64_t left) {
  const char* p = vector + cache_offset(kType) + d * size_of(kType);
  const Floats x = left >= kLanes ? load_as(kType, p) : load_some(kType, p, static_cast<int>(left));
  if constexpr (kType != DType::kI8) return x;
  float scale;
  std::memcpy(&scale, vector, sizeof scale);
  return x * splat(scale);
}

struct Span {  // tokens of a segment that are looked at
  int64_t base;
  int begin, end;  // from base
};

TARS_INLINE Span span_of(const AttentionTask& t, int64_t base) {
  return {base, static_cast<int>(t.begin > base ? t.begin - base : 0), static_cast<int>(t.end - base < kSegment ? t.end - base : kSegment)};
}

// What the products of attention are made of: numbers in float32, or pairs of bfloat16, of neighbouring dimensions of queries and keys and
// of neighbouring tokens' weights and values. An element is 32 bits of either.
struct Singles {
  static constexpr int kNumbers = 1;
  TARS_INLINE Floats add(Floats a, Floats b, Floats sum) { return fma(a, b, sum); }
  TARS_INLINE int64_t elements(const AttentionTask& t) { return padded_dim(t); }
  // A score's weight under a maximum, of which `offset` is made once.
  TARS_INLINE Floats offset(Floats top) { return top; }
  TARS_INLINE Floats weight(Floats score, Floats offset) { return exp_of_negative(score - offset); }
  template <DType kType>
  TARS_INLINE Floats key(const char* vector, int64_t i, int64_t left) { return load_cached<kType>(vector, i, left); }
  template <DType kType>
  TARS_INLINE Floats value(const char* const* vectors, int64_t d, int64_t left) { return load_cached<kType>(*vectors, d, left); }
};

#if defined(__AVX512F__)
// 2**x, with an error of 1e-4: a twentieth of what rounding to bfloat16 makes. 2**-inf is 0.
TARS_INLINE Floats power_of_two(Floats x) {
  const Floats f = {{(FloatPart)_mm512_reduce_ps((__m512)x.part[0], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}};  // in [0, 1]
  Floats p = fma(splat(0.0782679655f), f, splat(0.2263076777f));
  p = fma(fma(p, f, splat(0.6954243568f)), f, splat(1.0f));
  return {{(FloatPart)_mm512_scalef_ps((__m512)p.part[0], (__m512)x.part[0])}};
}

struct Pairs {
  static constexpr int kNumbers = 2;
  TARS_INLINE bool takes(const AttentionTask& t) { return t.cache_type == DType::kBF16 && t.head_dim % 2 == 0 && has_pairs(); }
  TARS_INLINE Floats add(Floats a, Floats b, Floats sum) { return dot_pairs(a, b, sum); }
  TARS_INLINE int64_t elements(const AttentionTask& t) { return t.head_dim / 2; }
  TARS_INLINE Floats offset(Floats top) { return top * splat(-1.44269504f); }
  TARS_INLINE Floats weight(Floats score, Floats offset) { return power_of_two(fma(score, splat(1.44269504f), offset)); }
  template <DType>
  TARS_INLINE Floats key(const char* vector, int64_t i, int64_t left) {
    return left >= kLanes ? load(reinterpret_cast<const float*>(vector) + i) : load_some(DType::kF32, vector + 4 * i, static_cast<int>(left));
  }
  template <DType>
  TARS_INLINE Floats value(const char* const* vectors, int64_t d, int64_t left) {
    return as_floats(bits(vectors[0] + 2 * d, left) | shift_left<16>(bits(vectors[1] + 2 * d, left)));
  }

 private:
  TARS_INLINE Ints bits(const char* p, int64_t left) {
    return left >= kLanes ? widen_u16(p) : shift_right<16>(as_ints(load_some(DType::kBF16, p, static_cast<int>(left)))) & splat(0xffff);
  }
};
#endif

alignas(64) constexpr char kZeros[4 * kMaxHeadDim] = {};

// The cached values of an element's tokens, from `at` of a span; zeros for one outside the span, where anything may stand.
template <class Terms>
TARS_INLINE void find_values(const AttentionTask& t, Span span, int at, const char* (&vectors)[Terms::kNumbers]) {
  for (int i = 0; i < Terms::kNumbers; ++i)
    vectors[i] = at + i < span.begin || at + i >= span.end ? kZeros : cached(t, t.v_pages, span.base + at + i);
}

// How two softmaxes become one: the weights of each under their common maximum (Milakov and Gimelshein 2018, arXiv 1805.02867).
struct Join {
  Floats maximum, old_weight, new_weight;
};
TARS_INLINE Join join(Floats old_maximum, Floats new_maximum) {
  const Floats top = max(new_maximum, old_maximum);
  return {top, exp_of_negative(old_maximum - top), exp_of_negative(new_maximum - top)};
}
TARS_INLINE Floats joined(Floats old_sum, Floats old_weight, Floats new_sum, Floats new_weight) {
  return fma(new_sum, new_weight, old_sum * old_weight);
}

}  // namespace tars::TARS_ISA
