// A single query: lanes are dimensions. See `attend.h`.
#pragma once
#include "segment.h"

namespace tars::TARS_ISA {

constexpr int kAhead = 64;  // tokens of keys fetched before they are needed

// Pages lie apart, so the processor's own prefetcher stops at each page's end.
TARS_INLINE void prefetch_token(const AttentionTask& t, const void* pages, int64_t token) {
  const char* p = cached(t, pages, token);
  for (int64_t at = 0, bytes = cache_bytes(t.cache_type, t.head_dim); at < bytes; at += 64) __builtin_prefetch(p + at);
}

// Brings a vector of the next task into the second-level cache, as far into its tokens as `token` is into this task's.
TARS_INLINE void prefetch_next(const AttentionTask& t, const void* pages, int64_t token) {
  if (!t.next) return;
  const int64_t at = t.next->begin + token - t.begin;
  if (at >= t.next->end) return;
  const char* p = cached(*t.next, pages, at);
  for (int64_t i = 0, bytes = cache_bytes(t.cache_type, t.head_dim); i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Sums of 16 vectors, one a lane.
TARS_INLINE Floats sums16(const Floats* x) {
#if defined(__AVX512F__)
  __m512 pair[8], quad[4], half[2];
  for (int i = 0; i < 8; ++i) {
    __m512 a = (__m512)x[2 * i].part[0], b = (__m512)x[2 * i + 1].part[0];
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // per 128 bits: a0+a2, b0+b2, a1+a3, b1+b3
  }
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    __m512 a = quad[2 * i], b = quad[2 * i + 1];
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  return {{(FloatPart)all}};
#elif defined(__AVX2__)
  Floats out;
  for (int g = 0; g < 2; ++g) {  // of the first and the last 8 vectors
    __m256 two[2][2];            // [vectors 0-3, 4-7][part]: sums of 4 in each 128 bits
    for (int q = 0; q < 2; ++q) {
      const Floats* y = x + 8 * g + 4 * q;
      TARS_EACH_PART(i) {
        const __m256 a = (__m256)y[0].part[i], b = (__m256)y[1].part[i], c = (__m256)y[2].part[i], d = (__m256)y[3].part[i];
        const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));  // a0+a2, b0+b2, a1+a3, b1+b3
        const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
        two[q][i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
      }
    }
    __m256 eight[kParts];
    TARS_EACH_PART(i) eight[i] = _mm256_add_ps(_mm256_permute2f128_ps(two[0][i], two[1][i], 0x20), _mm256_permute2f128_ps(two[0][i], two[1][i], 0x31));
    out.part[g] = (FloatPart)_mm256_add_ps(eight[0], eight[1]);
  }
  return out;
#else
  float out[kLanes];
  for (int i = 0; i < kLanes; ++i) out[i] = sum(x[i]);
  return load(out);
#endif
}

// Scores of `kHeads` queries [kHeads][padded] with 16 tokens from `base + at`, of which those in the span count, to scores[h][at ..].
template <class Terms, DType kType, int kHeads>
static void score_few(const AttentionTask& t, const float* queries, Span span, int at, float* scores) {
  const int64_t padded = padded_dim(t), elements = t.head_dim / Terms::kNumbers;
  Floats acc[kHeads][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    Floats sum[kHeads];
    for (int h = 0; h < kHeads; ++h) sum[h] = splat(0.0f);
    if (at + i >= span.begin && at + i < span.end) {
      const int64_t token = span.base + at + i;
      prefetch_token(t, t.v_pages, token);  // wanted as soon as the scores are known
      if (at + i + kAhead < span.end) prefetch_token(t, t.k_pages, token + kAhead);
      prefetch_next(t, t.k_pages, token);
      const char* k = cached(t, t.k_pages, token);
      for (int64_t d = 0; d < elements; d += kLanes) {
        const Floats x = Terms::template key<kType>(k, d, elements - d);
        for (int h = 0; h < kHeads; ++h) sum[h] = Terms::add(x, load(queries + h * padded + d), sum[h]);
      }
    }
    for (int h = 0; h < kHeads; ++h) acc[h][i] = sum[h];
  }
  for (int h = 0; h < kHeads; ++h) store(scores + h * kSegment + at, sums16(acc[h]));
}

template <class Terms, DType kType, int kHeads, int kVectors>
TARS_INLINE void values_few(const AttentionTask& t, Span span, int64_t d, const float* weights, float* values) {
  const int64_t padded = padded_dim(t);
  Floats acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) acc[h][v] = splat(0.0f);
  for (int i = span.begin / Terms::kNumbers * Terms::kNumbers; i < span.end; i += Terms::kNumbers) {
    const char* vectors[Terms::kNumbers];
    find_values<Terms>(t, span, i, vectors);
    if (d == 0)
      for (int token = i; token < i + Terms::kNumbers; ++token) prefetch_next(t, t.v_pages, span.base + token);
    Floats w[kHeads];
    for (int h = 0; h < kHeads; ++h) w[h] = splat(weights[h * kSegment + i / Terms::kNumbers]);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = d + v * kLanes;
      const Floats x = Terms::template value<kType>(vectors, at, kVectors > 1 ? kLanes : t.head_dim - at);
      for (int h = 0; h < kHeads; ++h) acc[h][v] = Terms::add(w[h], x, acc[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) store(values + h * padded + d + v * kLanes, acc[h][v]);
}

// A segment's scores to weights, in place; those outside the span get weight 0.
template <class Terms>
TARS_INLINE void softmax_few(float* scores, Span span, float cap, float* maximum, float* total) {
  Floats top = splat(kMasked);
  for (int i = 0; i < span.end; i += kLanes) {
    const Ints at = iota() + splat(i);
    Floats x = softcap(load(scores + i), cap);
    x = select(less(at, splat(span.begin)), splat(kMasked), select(less(at, splat(span.end)), x, splat(kMasked)));
    store(scores + i, x);
    top = max(x, top);
  }
  const Floats offset = Terms::offset(splat(max_of(top)));
  Floats sums = splat(0.0f);
  for (int i = 0; i < span.end; i += kLanes) {
    const Ints at = iota() + splat(i);
    Floats w = Terms::weight(load(scores + i), offset);
    w = select(less(at, splat(span.begin)), splat(0.0f), select(less(at, splat(span.end)), w, splat(0.0f)));
    store(scores + i, w);
    sums = sums + w;
  }
  *maximum = max_of(top);
  *total = sum(sums);
}

// Numbers, a multiple of 16, in place to bfloat16 that stand beside each other, then zeros.
TARS_INLINE void to_pairs(float* x, int64_t count) {
  uint16_t* out = reinterpret_cast<uint16_t*>(x);
  for (int64_t i = 0; i < count; i += kLanes) store_bf16(out + i, load(x + i));
  std::memset(out + count, 0, 2 * count);
}

// One segment of one query; its softmax goes to the task's partials.
template <class Terms, DType kType, int kHeads>
static void attend_few(const AttentionTask& t, float* scratch, int64_t head) {
  const int64_t padded = padded_dim(t);
  const Span span = span_of(t, t.begin / kSegment * kSegment);
  float* queries = scratch;
  float* values = queries + kHeads * padded;
  float* scores = values + kHeads * padded;  // [kHeads][kSegment]
  for (int h = 0; h < kHeads; ++h) {
    const int64_t at = (t.first * t.heads + t.head + head + h) * t.head_dim;
    for (int64_t d = 0; d < padded; d += kLanes) {
      const int64_t left = t.head_dim - d < kLanes ? t.head_dim - d : kLanes;
      Floats x = load_some(t.q_type, static_cast<const char*>(t.q) + (at + d) * size_of(t.q_type), static_cast<int>(left));
      store(queries + h * padded + d, x * splat(t.scale));
    }
    if constexpr (Terms::kNumbers == 2) to_pairs(queries + h * padded, padded);
  }
  for (int i = span.begin; i < span.end && i < span.begin + kAhead; ++i) prefetch_token(t, t.k_pages, span.base + i);
  for (int at = span.begin / kLanes * kLanes; at < span.end; at += kLanes) score_few<Terms, kType, kHeads>(t, queries, span, at, scores);
  for (int h = 0; h < kHeads; ++h) {
    float* partial = t.partial + (head + h) * partial_floats(t.head_dim);
    std::memset(scores + h * kSegment, 0, sizeof(float) * (span.begin / kLanes * kLanes));
    softmax_few<Terms>(scores + h * kSegment, span, t.softcap, partial, partial + 1);
    if constexpr (Terms::kNumbers == 2) to_pairs(scores + h * kSegment, kSegment);
  }
  constexpr int kVectors = kHeads * kParts > 6 ? 1 : kHeads * kParts > 3 ? 2 : 4;  // sums that stay in 16 registers
  int64_t d = 0;
  for (; d + kVectors * kLanes <= t.head_dim; d += kVectors * kLanes) values_few<Terms, kType, kHeads, kVectors>(t, span, d, scores, values);
  for (; d < t.head_dim; d += kLanes) values_few<Terms, kType, kHeads, 1>(t, span, d, scores, values);
  for (int h = 0; h < kHeads; ++h)
    std::memcpy(t.partial + (head + h) * partial_floats(t.head_dim) + 2, values + h * padded, sizeof(float) * t.head_dim);
}

template <class Terms, DType kType>
static void attend_one(const AttentionTask& t, float* scratch) {
  int64_t head = 0;
  if constexpr (kParts < 4) {  // several heads share a read of the cache; not worth compiling for the portable path
    for (; t.group - head >= 4; head += 4) attend_few<Terms, kType, 4>(t, scratch, head);
    if (t.group - head == 3) return attend_few<Terms, kType, 3>(t, scratch, head);
    for (; t.group - head >= 2; head += 2) attend_few<Terms, kType, 2>(t, scratch, head);
  }
  for (; head < t.group; ++head) attend_few<Terms, kType, 1>(t, scratch, head);
}

// Joins the softmaxes of one query's segments; each segment's block is group * partial_floats long.
static void merge(const AttentionTask& t, int64_t segments) {
  const int64_t size = partial_floats(t.head_dim);
  for (int64_t h = 0; h < t.group; ++h) {
    float* first = t.partial + h * size;
    Floats maximum = splat(kMasked), total = splat(0.0f);
    for (int64_t i = 0; i < segments; ++i) {
      const float* segment = first + i * t.group * size;
      const Join j = join(maximum, splat(segment[0]));
      total = joined(total, j.old_weight, splat(segment[1]), j.new_weight);
      for (int64_t d = 0; d < t.head_dim; d += kLanes) {
        const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
        const Floats old = i ? load_some(DType::kF32, first + 2 + d, lanes) : splat(0.0f);
        const Floats values = joined(old, j.old_weight, load_some(DType::kF32, segment + 2 + d, lanes), j.new_weight);
        store_some(DType::kF32, first + 2 + d, values, lanes);
      }
      maximum = j.maximum;
    }
    const Floats inverse = splat(1.0f) / max(total, splat(kLeastTotal));
    char* out = static_cast<char*>(t.out) + (t.first * t.heads + t.head + h) * t.head_dim * size_of(t.q_type);
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
      store_some(t.q_type, out + d * size_of(t.q_type), load_some(DType::kF32, first + 2 + d, lanes) * inverse, lanes);
    }
  }
}

}  // namespace tars::TARS_ISA
