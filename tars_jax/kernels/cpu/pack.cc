#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

namespace tars {
namespace {

constexpr uint32_t kOffset128 = 0x80808080;

// The rows and the block of one tile of the source.
struct Place {
  int64_t first_row, rows, block;
};

// The weight groups of a block that are not padding.
int64_t groups_in(const Format& f, int64_t block) {
  const int64_t halves = kGroup / f.group;
  return std::min(halves, f.inputs / f.group - block * halves);
}

// The first group of a block in a row, where `step` bytes lie between one group and the next.
const uint8_t* group_at(const Format& f, const uint8_t* source, int64_t step, int64_t row, int64_t block) {
  return source + (row * (f.inputs / f.group) + block * (kGroup / f.group)) * step;
}

// The scales or minima of a block.
template <int kSize>
void pack_scales(const Format& f, const uint8_t* source, int64_t step, const Place& at, uint8_t* out) {
  const int64_t next_row = f.inputs / f.group * step;
  for (int64_t g = 0; g < groups_in(f, at.block); ++g, out += kLanes * kSize) {
    const uint8_t* in = group_at(f, source, step, at.first_row, at.block) + g * step;
    for (int64_t o = 0; o < at.rows; ++o) std::memcpy(out + o * kSize, in + o * next_row, kSize);
  }
}

// Codes of 4 or 8 bits: kBytes of a group and row.
template <int kBytes>
void pack_codes(const Format& f, const Source& s, const Place& at, uint8_t* out) {
  const uint32_t flip = f.bits == 8 ? kOffset128 : 0;
  const int64_t next_row = f.inputs / f.group * s.code_step;
  for (int64_t g = 0; g < groups_in(f, at.block); ++g, out += kBytes * kLanes) {
    const uint8_t* in = group_at(f, s.codes, s.code_step, at.first_row, at.block) + g * s.code_step;
    for (int64_t o = 0; o < at.rows; ++o) {
      uint32_t quads[kBytes / kQuad];
      std::memcpy(quads, in + o * next_row, kBytes);
      for (int q = 0; q < kBytes / kQuad; ++q) {
        quads[q] ^= flip;
        std::memcpy(out + q * 64 + o * 4, &quads[q], 4);
      }
    }
  }
}

// Codes of 5 or 6 bits, a byte each in the source: nibbles, then the bits above them.
void pack_split(const Format& f, const Source& s, const Place& at, uint8_t* out) {
  const int bits = static_cast<int>(f.bits), group = static_cast<int>(f.group);
  const uint32_t every = 0x01010101, mask = ((1u << bits) - 1) * every, sign = f.affine ? 0 : (1u << (bits - 1)) * every;
  const int64_t groups = groups_in(f, at.block), quads = groups * group / kQuad;
  for (int64_t o = 0; o < at.rows; ++o) {
    uint32_t quad[kGroup / kQuad] = {}, vectors[kNibbleVectors + 2] = {};
    const uint8_t* in = group_at(f, s.codes, s.code_step, at.first_row + o, at.block);
    for (int64_t g = 0; g < groups; ++g) std::memcpy(quad + g * group / kQuad, in + g * s.code_step, group);
    for (int q = 0; q < quads; ++q) quad[q] = (quad[q] ^ sign) & mask;
    for (int v = 0; v < kNibbleVectors; ++v)
      vectors[v] = (quad[low_quad(group, v)] & 0x0f0f0f0f) | (quad[high_quad(group, v)] & 0x0f0f0f0f) << 4;
    for (int q = 0; q < quads; ++q) vectors[kNibbleVectors + above(bits, q).vector] |= (quad[q] >> 4 & 0x0f0f0f0f) << above(bits, q).shift;
    for (int v = 0; v < bits; ++v) std::memcpy(out + v * 64 + o * 4, &vectors[v], 4);
  }
}

using PackCodes = void (*)(const Format&, const Source&, const Place&, uint8_t*);
PackCodes codes_packer(const Format& f) {
  if (f.bits == 4) return f.group == 32 ? pack_codes<16> : pack_codes<8>;
  if (f.bits == 8) return f.group == 32 ? pack_codes<32> : pack_codes<16>;
  return pack_split;
}

void pack_quantized(const Format& f, const Source& s, int64_t tile, uint8_t* out) {
  const int64_t first = tile * kLanes, rows = std::min<int64_t>(kLanes, f.outputs - first);
  const auto codes = codes_packer(f);
  const auto scales = f.dtype == DType::kF32 ? pack_scales<4> : pack_scales<2>;
  if (rows < kLanes || f.inputs % kGroup) std::memset(out, 0, f.tile_bytes());
  for (int64_t b = 0; b < f.blocks(); ++b, out += f.block_bytes()) {
    const Place at{first, rows, b};
    codes(f, s, at, out);
    scales(f, s.scales, s.scale_step, at, out + f.code_bytes());
    if (f.affine) scales(f, s.mins, s.scale_step, at, out + f.code_bytes() + f.scale_bytes());
  }
}

// Element k of a tile's output o: bfloat16 as pairs, the others input by input.
int64_t dense_at(const Format& f, int64_t k, int64_t o) {
  return f.dtype == DType::kBF16 ? (k / 2 * kLanes + o) * 2 + k % 2 : k * kLanes + o;
}

template <class T>
void pack_dense(const Format& f, const uint8_t* codes, int64_t tile, uint8_t* out) {
  const int64_t first = tile * kLanes, rows = std::min<int64_t>(kLanes, f.outputs - first);
  if (rows < kLanes || f.inputs % 2) std::memset(out, 0, f.tile_bytes());
  for (int64_t at = 0; at < f.inputs; at += 64)  // 64 inputs of 16 rows at a time stay in the first-level cache
    for (int64_t o = 0; o < rows; ++o)
      for (int64_t k = at; k < std::min(at + 64, f.inputs); ++k)
        std::memcpy(out + dense_at(f, k, o) * sizeof(T), codes + ((first + o) * f.inputs + k) * sizeof(T), sizeof(T));
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                : exponent     ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
                               : std::ldexp(static_cast<float>(mantissa), -24);
  return bits & 0x8000 ? -value : value;
}

int code_at(const Format& f, const uint8_t* block, int64_t lane, int64_t k) {
  const int64_t quad = k / kQuad;
  if (f.bits == 8) return block[quad * 64 + lane * 4 + k % kQuad] - 128;
  const int bits = static_cast<int>(f.bits), group = static_cast<int>(f.group);
  int code = f.affine ? 0 : -(1 << (bits - 1));
  for (int v = 0; v < kNibbleVectors; ++v) {
    const uint8_t byte = block[v * 64 + lane * 4 + k % kQuad];
    if (low_quad(group, v) == quad) code += byte & 15;
    if (high_quad(group, v) == quad) code += byte >> 4;
  }
  if (bits > 4) {
    const Above at = above(bits, static_cast<int>(quad));
    code += (block[(kNibbleVectors + at.vector) * 64 + lane * 4 + k % kQuad] >> at.shift & ((1 << (bits - 4)) - 1)) << 4;
  }
  return code;
}

}  // namespace

float to_float(DType type, const uint8_t* p) {
  uint16_t half;
  float value;
  switch (type) {
    case DType::kF16: std::memcpy(&half, p, 2); return half_to_float(half);
    case DType::kBF16: {
      std::memcpy(&half, p, 2);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    default: std::memcpy(&value, p, 4); return value;
  }
}

void pack_tile(const Format& f, const Source& s, int64_t tile, uint8_t* out) {
  if (f.quantized()) return pack_quantized(f, s, tile, out);
  return f.dtype == DType::kF32 ? pack_dense<uint32_t>(f, s.codes, tile, out) : pack_dense<uint16_t>(f, s.codes, tile, out);
}

void take_row(const Format& f, const uint8_t* data, int64_t id, float* out) {
  const uint8_t* tile = data + id / kLanes * f.tile_bytes();
  const int64_t lane = id % kLanes, size = size_of(f.dtype);
  if (!f.quantized()) {
    for (int64_t k = 0; k < f.inputs; ++k) out[k] = to_float(f.dtype, tile + dense_at(f, k, lane) * size);
    return;
  }
  float scale = 0.0f, min = 0.0f;
  for (int64_t k = 0; k < f.inputs; ++k) {
    const uint8_t* block = tile + k / kGroup * f.block_bytes();
    if (k % f.group == 0) {
      const uint8_t* scales = block + f.code_bytes() + (k % kGroup / f.group * kLanes + lane) * size;
      scale = to_float(f.dtype, scales);
      if (f.affine) min = to_float(f.dtype, scales + f.scale_bytes());
    }
    out[k] = static_cast<float>(code_at(f, block, lane, k % kGroup)) * scale + min;
  }
}

}  // namespace tars

// ctypes entry: packs all tiles with `threads` threads. format: bits, group, affine, dtype, outputs, inputs; steps: a Source's.
extern "C" __attribute__((visibility("default"))) void tars_pack(const int64_t* format, const void* codes, const void* scales, const void* mins,
                                                                   const int64_t* steps, void* out, int64_t threads) {
  const tars::Format f{format[0], format[1], format[2], static_cast<tars::DType>(format[3]), format[4], format[5]};
  const tars::Source s{static_cast<const uint8_t*>(codes), static_cast<const uint8_t*>(scales), static_cast<const uint8_t*>(mins), steps[0], steps[1]};
  constexpr int64_t kTilesPerClaim = 8;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t first; (first = next.fetch_add(kTilesPerClaim)) < f.tiles();)
      for (int64_t t = first; t < std::min(first + kTilesPerClaim, f.tiles()); ++t)
        tars::pack_tile(f, s, t, static_cast<uint8_t*>(out) + t * f.tile_bytes());
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, tars::ceil_div(f.tiles(), kTilesPerClaim)); ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
}
