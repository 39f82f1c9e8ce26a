// Attention by AMX to a bfloat16 cache: up to 32 (query, head) pairs, one query's included. See `attend.h`.
//
//   scores   keys [16 tokens][32 dimensions] as they are cached, times queries [16 pairs of dimensions][16 lanes]
//   values   weights [16 lanes][32 tokens], times values [16 pairs of tokens][16 dimensions]
//
// The dimensions of values are in an order of their own until the end: of each 32 first the even, then the odd ones.
#pragma once
#include <algorithm>

#include "attend_block.h"
#include "tile_registers.h"

namespace tars::TARS_ISA {

constexpr int kStep = 32;  // dimensions or tokens of one multiplication
constexpr int kTokens = 16;  // whose keys are scored at once
constexpr int kSegmentSteps = kSegment / kStep;

struct TileLanes {  // scratch of one task; lanes are kQueryRows
  int64_t dims;        // head_dim padded to kStep
  int64_t lanes;       // in use
  float* scores;       // [tokens of a segment][lanes]
  uint32_t* queries;   // [dims / 2][lanes]: pairs
  uint32_t* weights;   // [lanes / 16][steps][16 lanes][16 pairs of tokens]
  char* keys;          // [16][dims]: those that cannot be taken where they are
  float *sums, *segment;                   // [lanes][dims]: of the segments so far, and of this one
  float *maximum, *total;                  // [lanes]
  float *segment_maximum, *segment_total;
};

constexpr __mmask32 kHighWords = 0xaaaaaaaa;  // of each 32 bits

static TileLanes tile_lanes(const AttentionTask& t, float* scratch) {
  TileLanes s;
  s.dims = ceil_div(t.head_dim, kStep) * kStep;
  s.lanes = t.count * t.group;
  const auto take = [&scratch](int64_t floats) { return scratch += floats, scratch - floats; };
  s.scores = take(kSegment * kQueryRows);
  s.queries = reinterpret_cast<uint32_t*>(take(s.dims / 2 * kQueryRows));
  s.weights = reinterpret_cast<uint32_t*>(take(kSegment / 2 * kQueryRows));
  s.keys = reinterpret_cast<char*>(take(kTokens * s.dims / 2));
  s.sums = take(kQueryRows * s.dims);
  s.segment = take(kQueryRows * s.dims);
  for (float** x : {&s.maximum, &s.total, &s.segment_maximum, &s.segment_total}) *x = take(kQueryRows);
  return s;
}

// Up to 32 bfloat16; the rest is zero.
TARS_INLINE __m512i load_words(const char* p, int64_t count) {
  if (count >= kStep) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
}

// Scaled queries of 16 lanes from `first` on to pairs of dimensions [dims / 2][lanes], by way of `rows`.
static void pair_queries(const AttentionTask& t, const TileLanes& s, int64_t first, float* rows) {
  const int64_t pairs = s.dims / 2;
  for (int64_t r = 0; r < kLanes; ++r) {
    uint32_t* row = reinterpret_cast<uint32_t*>(rows) + r * pairs;
    std::memset(row, 0, pairs * sizeof *row);
    const int64_t lane = first + r;
    if (lane >= s.lanes) continue;
    const char* q = static_cast<const char*>(t.q) + ((t.first + lane / t.group) * t.heads + t.head + lane % t.group) * t.head_dim * size_of(t.q_type);
    const auto part = [&](int64_t d) {
      const int64_t left = std::max<int64_t>(std::min<int64_t>(t.head_dim - d, kLanes), 0);
      return load_some(t.q_type, q + (left ? d : 0) * size_of(t.q_type), static_cast<int>(left)) * splat(t.scale);
    };
    for (int64_t d = 0; d < s.dims; d += kStep) store_pairs(row + d / 2, part(d), part(d + kLanes));
  }
  float* out = reinterpret_cast<float*>(s.queries) + first;
  for (int64_t d = 0; d < pairs; d += kLanes) transpose16(rows + d, pairs, out + d * kQueryRows, kQueryRows);
}

struct Vectors {  // of several tokens
  const char* first;
  int64_t stride;
};

// Whether 16 tokens from a multiple of 16 on stand one behind the other.
TARS_INLINE bool in_runs(const AttentionTask& t) { return t.page % kTokens == 0; }

// Keys of 16 tokens from `at` of a segment on, those outside of the span being anything.
static Vectors keys_at(const AttentionTask& t, const TileLanes& s, Span span, int at) {
  if (in_runs(t) && t.head_dim == s.dims) return {cached(t, t.k_pages, span.base + at), 2 * t.head_dim};
  for (int i = 0; i < kTokens; ++i) {
    const bool seen = at + i >= span.begin && at + i < span.end;
    const char* key = seen ? cached(t, t.k_pages, span.base + at + i) : nullptr;
    for (int64_t d = 0; d < s.dims; d += kStep)
      _mm512_storeu_si512(s.keys + 2 * (i * s.dims + d), seen ? load_words(key + 2 * d, t.head_dim - d) : _mm512_setzero_si512());
  }
  return {s.keys, 2 * s.dims};
}

// Brings vectors of 16 tokens into the second-level cache, from `token`, a multiple of 16, on.
TARS_INLINE void prefetch_run(const AttentionTask& t, const void* pages, int64_t token) {
  if (!in_runs(t) || token >= t.end || token + kTokens <= t.begin) return;
  const char* p = cached(t, pages, token);
  for (int64_t at = 0; at < kTokens * 2 * t.head_dim; at += 64) __builtin_prefetch(p + at, 0, 2);
}

// A single query reads more than it computes: what the next task will want is fetched on the way.
TARS_INLINE void prefetch_next_run(const AttentionTask& t, const void* pages, int at) {
  if (t.count == 1 && t.next) prefetch_run(*t.next, pages, t.next->begin / kSegment * kSegment + at);
}

template <int kVectors>
static void score_tokens(const AttentionTask& t, const TileLanes& s, Span span) {
  for (int at = span.begin / kTokens * kTokens; at < span.end; at += kTokens) {
    const Vectors keys = keys_at(t, s, span, at);
    prefetch_next_run(t, t.k_pages, at);
    clear_tile<0>();
    if constexpr (kVectors == 2) clear_tile<1>();
    for (int64_t d = 0; d < s.dims; d += kStep) {
      const uint32_t* queries = s.queries + d / 2 * kQueryRows;
      load_tile<4>(keys.first + 2 * d, keys.stride);
      load_tile<6>(queries, 4 * kQueryRows);
      multiply_pairs<0, 4, 6>();
      if constexpr (kVectors == 2) {
        load_tile<7>(queries + kLanes, 4 * kQueryRows);
        multiply_pairs<1, 4, 7>();
      }
    }
    float* scores = s.scores + at * kQueryRows;
    store_tile<0>(scores, 4 * kQueryRows);
    if constexpr (kVectors == 2) store_tile<1>(scores + kLanes, 4 * kQueryRows);
  }
}

// Scores of a pair of tokens and 16 lanes to weights, as an element; adds them to the totals.
template <bool kMask>
TARS_INLINE Floats weigh(const float* scores, Floats offset, Floats (&totals)[2]) {
  Floats weights[2];
  TARS_UNROLL for (int i = 0; i < 2; ++i) {
    const Floats x = load(scores + i * kQueryRows);
    weights[i] = Pairs::weight(x, offset);
    if constexpr (kMask) weights[i] = select(less(splat(kMasked), x), weights[i], select(less(x, splat(0.0f)), splat(0.0f), weights[i]));
    totals[i] = totals[i] + weights[i];
  }
  const Ints half = splat(0x8000);
  const __m512i low = _mm512_srli_epi32((__m512i)(as_ints(weights[0]) + half).part[0], 16), high = (__m512i)(as_ints(weights[1]) + half).part[0];
  return as_floats(Ints{{(IntPart)_mm512_mask_blend_epi16(kHighWords, low, high)}});
}

// A segment's scores to weights of 16 lanes; their maximum and total.
static void soften(const AttentionTask& t, const TileLanes& s, Span span, int vector) {
  float* scores = s.scores + vector * kLanes;
  const Sight sight = sight_of(t, span, vector);
  const Floats top = largest(t, scores, span, sight), offset = Pairs::offset(top);
  for (int i = span.begin / kStep * kStep; i < span.begin; ++i) store(scores + i * kQueryRows, splat(kMasked));
  for (int i = span.end; i % kStep; ++i) store(scores + i * kQueryRows, splat(kMasked));
  Floats totals[2] = {splat(0.0f), splat(0.0f)};
  alignas(64) float pairs[kLanes * kLanes];
  for (int step = span.begin / kStep; step < ceil_div(span.end, kStep); ++step) {
    const float* from = scores + step * kStep * kQueryRows;
    const bool whole = sight.all && step * kStep >= span.begin && (step + 1) * kStep <= span.end;
    for (int i = 0; i < kLanes; ++i, from += 2 * kQueryRows) store(pairs + i * kLanes, whole ? weigh<false>(from, offset, totals) : weigh<true>(from, offset, totals));
    transpose16(pairs, kLanes, reinterpret_cast<float*>(s.weights) + (vector * kSegmentSteps + step) * kLanes * kLanes, kLanes);
  }
  store(s.segment_maximum + vector * kLanes, top);
  store(s.segment_total + vector * kLanes, totals[0] + totals[1]);
}

// Values of two tokens, dimensions [from, to), as pairs.
TARS_INLINE void pair_vectors(const AttentionTask& t, const char* first, const char* second, int64_t from, int64_t to, uint32_t* out) {
  for (int64_t d = from; d < to; d += kStep, out += kStep) {
    const __m512i a = load_words(first + 2 * d, t.head_dim - d), b = load_words(second + 2 * d, t.head_dim - d);
    _mm512_storeu_si512(out, _mm512_mask_blend_epi16(kHighWords, a, _mm512_slli_epi32(b, 16)));
    _mm512_storeu_si512(out + kLanes, _mm512_mask_blend_epi16(kHighWords, _mm512_srli_epi32(a, 16), b));
  }
}

// The same of 32 tokens from `begin` of a segment on, [pairs of tokens][kWidth]; zeros for those outside of the span.
template <int kWidth>
static void pair_values(const AttentionTask& t, Span span, int begin, int64_t from, int64_t to, uint32_t* out) {
  for (int at = begin; at < begin + kStep; at += kTokens) {
    if (from == 0) prefetch_next_run(t, t.v_pages, at);
    const bool run = in_runs(t) && at >= span.begin && at + kTokens <= span.end;
    const char* value = run ? cached(t, t.v_pages, span.base + at) : nullptr;
    for (int i = at; i < at + kTokens; i += 2, out += kWidth) {
      const char* vectors[2];
      if (run) vectors[0] = value, vectors[1] = value + 2 * t.head_dim, value += 4 * t.head_dim;
      else find_values<Pairs>(t, span, i, vectors);
      pair_vectors(t, vectors[0], vectors[1], from, to, out);
    }
  }
}

// Weights times values, to the segment's sums: four results at once, of one or two vectors of lanes.
template <int kVectors>
static void weigh_values(const AttentionTask& t, const TileLanes& s, Span span) {
  constexpr int kWidth = kLanes * 4 / kVectors;  // dimensions at once
  alignas(64) uint32_t values[kLanes * kWidth];
  for (int64_t d = 0; d < s.dims; d += kWidth) {
    const int64_t end = std::min(d + kWidth, s.dims);
    clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
    for (int step = span.begin / kStep; step < ceil_div(span.end, kStep); ++step) {
      pair_values<kWidth>(t, span, step * kStep, d, end, values);
      const uint32_t* weights = s.weights + step * kLanes * kLanes;
      load_tile<4>(weights, 64);
      load_tile<6>(values, 4 * kWidth);
      load_tile<7>(values + kLanes, 4 * kWidth);
      multiply_pairs<0, 4, 6>();
      multiply_pairs<1, 4, 7>();
      if constexpr (kVectors == 2) {
        load_tile<5>(weights + kSegmentSteps * kLanes * kLanes, 64);
        multiply_pairs<2, 5, 6>();
        multiply_pairs<3, 5, 7>();
      } else if (end - d == kWidth) {
        load_tile<6>(values + 2 * kLanes, 4 * kWidth);
        load_tile<7>(values + 3 * kLanes, 4 * kWidth);
        multiply_pairs<2, 4, 6>();
        multiply_pairs<3, 4, 7>();
      }
    }
    float* out = s.segment + d;
    float* more = kVectors == 2 ? out + kLanes * s.dims : out + kStep;
    store_tile<0>(out, 4 * s.dims);
    store_tile<1>(out + kLanes, 4 * s.dims);
    if (kVectors == 1 && end - d < kWidth) continue;
    store_tile<2>(more, 4 * s.dims);
    store_tile<3>(more + kLanes, 4 * s.dims);
  }
}

static void join_segment(const TileLanes& s) {
  float old_weights[kQueryRows], new_weights[kQueryRows];
  for (int64_t r = 0; r < s.lanes; r += kLanes) {
    const Join j = join(load(s.maximum + r), load(s.segment_maximum + r));
    store(s.maximum + r, j.maximum);
    store(s.total + r, joined(load(s.total + r), j.old_weight, load(s.segment_total + r), j.new_weight));
    store(old_weights + r, j.old_weight);
    store(new_weights + r, j.new_weight);
  }
  for (int64_t r = 0; r < s.lanes; ++r) {
    for (int64_t at = r * s.dims; at < (r + 1) * s.dims; at += kLanes)
      store(s.sums + at, joined(load(s.sums + at), splat(old_weights[r]), load(s.segment + at), splat(new_weights[r])));
  }
}

// A lane's values times a factor, in order.
static void write_values(const AttentionTask& t, const float* values, Floats factor, DType type, char* out) {
  alignas(64) static constexpr int32_t kOrder[2][kLanes] = {{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const float* from = values + d / kStep * kStep;
    const __m512 mixed = _mm512_permutex2var_ps(_mm512_loadu_ps(from), _mm512_load_si512(kOrder[d / kLanes % 2]), _mm512_loadu_ps(from + kLanes));
    store_some(type, out + d * size_of(type), Floats{{(FloatPart)mixed}} * factor, static_cast<int>(std::min<int64_t>(t.head_dim - d, kLanes)));
  }
}

template <int kVectors>
static void attend_segment(const AttentionTask& t, const TileLanes& s, Span span) {
  score_tokens<kVectors>(t, s, span);
  for (int v = 0; v < kVectors; ++v) soften(t, s, span, v);
  weigh_values<kVectors>(t, s, span);
}

// One segment of one query; its softmax goes to the task's partials.
template <int kVectors>
static void attend_query(const AttentionTask& t, const TileLanes& s) {
  attend_segment<kVectors>(t, s, span_of(t, t.begin / kSegment * kSegment));
  for (int64_t r = 0; r < s.lanes; ++r) {
    float* partial = t.partial + r * partial_floats(t.head_dim);
    partial[0] = s.segment_maximum[r], partial[1] = s.segment_total[r];
    write_values(t, s.segment + r * s.dims, splat(1.0f), DType::kF32, reinterpret_cast<char*>(partial + 2));
  }
}

template <int kVectors>
static void attend_block(const AttentionTask& t, const TileLanes& s) {
  std::memset(s.sums, 0, sizeof(float) * s.lanes * s.dims);
  for (int r = 0; r < kQueryRows; ++r) s.maximum[r] = kMasked, s.total[r] = 0.0f;
  for (int64_t base = t.begin / kSegment * kSegment; base < t.end; base += kSegment) {
    attend_segment<kVectors>(t, s, span_of(t, base));
    join_segment(s);
  }
  for (int64_t r = 0; r < s.lanes; ++r) {
    const Floats inverse = splat(1.0f) / max(splat(s.total[r]), splat(kLeastTotal));
    char* out = static_cast<char*>(t.out) + ((t.first + r / t.group) * t.heads + t.head + r % t.group) * t.head_dim * size_of(t.q_type);
    write_values(t, s.sums + r * s.dims, inverse, t.q_type, out);
  }
}

static void attend_tiles(const AttentionTask& t, float* scratch) {
  const TileLanes s = tile_lanes(t, scratch);
  for (int64_t first = 0; first < s.lanes; first += kLanes) pair_queries(t, s, first, s.segment);
  set_tile_shapes(64);
  if (t.count == 1) s.lanes > kLanes ? attend_query<2>(t, s) : attend_query<1>(t, s);
  else s.lanes > kLanes ? attend_block<2>(t, s) : attend_block<1>(t, s);
  set_tile_shapes(0);
}

}  // namespace tars::TARS_ISA
