// How weights and activations lie in memory. Shared by every instruction set, so packed weights do not depend on the machine.
#pragma once
#include <cstdint>

namespace tars {

constexpr int kLanes = 16;  // outputs of a weight tile: one 512-bit accumulator
constexpr int kMostPanel = 16;  // activation rows handled together, at most: each instruction set has its own kPanel
constexpr int kGroup = 32;  // inputs that share an activation scale
constexpr int kQuad = 4;    // inputs one 8-bit dot instruction sums

enum class DType : int64_t { kF32 = 0, kF16 = 1, kBF16 = 2, kI8 = 3 };  // kI8: in the KV cache alone
enum class Activation : int64_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t size_of(DType type) { return type == DType::kF32 ? 4 : type == DType::kI8 ? 1 : 2; }

// A head's vector in the KV cache: its numbers, after a float32 scale if they are 8-bit codes.
inline int64_t cache_offset(DType type) { return type == DType::kI8 ? 4 : 0; }
inline int64_t cache_bytes(DType type, int64_t head_dim) { return cache_offset(type) + head_dim * size_of(type); }

// A packed matrix [outputs, inputs]: tiles of 16 outputs, each a run of blocks along the inputs.
//
// bits 4 or 8: a block is one group of 32 inputs: codes, then scales, then minima. Codes are vectors of 16 outputs x 4 inputs; with 4
//   bits a vector holds one quad in its low nibbles and another quad of the same group in its high ones. 8-bit codes are stored + 128.
//   Scales and minima are [32 / group][16]. Inputs are padded to 32 with zero scales.
// bits 5 or 6: nibbles as with 4 bits, then one or two vectors with the bits above them, quad by quad from the lowest.
// bits 16 or 32: a block is two inputs: bfloat16 as 16 pairs (one `vdpbf16ps` operand), float16 and float32 as [2][16].
struct Format {
  int64_t bits;      // 4, 5, 6 or 8; 16 or 32 when dense
  int64_t group;   // 16 or 32; 0 when dense
  int64_t affine;  // 1: minima follow the scales
  DType dtype;     // of the scales and minima, or of the elements when dense
  int64_t outputs;
  int64_t inputs;

  bool quantized() const { return bits <= 8; }
  int64_t tiles() const { return ceil_div(outputs, kLanes); }
  int64_t blocks() const { return ceil_div(inputs, quantized() ? kGroup : 2); }
  int64_t code_bytes() const { return kLanes * kGroup * bits / 8; }
  int64_t scale_bytes() const { return kLanes * (kGroup / group) * size_of(dtype); }
  int64_t block_bytes() const { return quantized() ? code_bytes() + scale_bytes() * (1 + affine) : 2 * kLanes * size_of(dtype); }
  int64_t tile_bytes() const { return blocks() * block_bytes(); }
};

// Which quad of a 4-bit group the low nibbles of vector `v` hold, and how far behind it the quad of the high nibbles is. Chosen so that
// four bytes of a GGUF Q4 group are one lane of a vector.
constexpr int low_quad(int group, int v) { return group == 32 ? v : (v / 2) * 4 + v % 2; }
constexpr int high_quad(int group, int v) { return low_quad(group, v) + (group == 32 ? 4 : 2); }
constexpr int kNibbleVectors = kGroup / 8;

// Where the bits above a quad's nibbles are, of codes of 5 or 6 bits: in which vector, and how far up in its bytes.
struct Above {
  int vector, shift;
};
constexpr Above above(int bits, int quad) { return {quad * (bits - 4) / 8, quad * (bits - 4) % 8}; }

// One activation row's group: codes with a scale, and sums of the codes for what is constant in a weight group (minima, code offsets).
struct ActivationGroup {
  int8_t codes[kGroup];
  float scale;
  float sum;          // scale * sum(codes)
  int32_t minus8;     // -8 * sum(codes)
  int32_t minus8_low; // the same over the first 16 inputs
};

// The same of 16 rows, as AMX takes it.
struct ActivationTile {
  int8_t codes[16][kGroup];
  float scale[16];
  float sums[3][16];  // scale * sum(codes), and of the first and the last 16 codes
};

// The forms of activations that weights may want.
enum class Form { kGroups, kTiles, kFloats, kPairs };
constexpr int kForms = 4;

// Activations of the rows of a panel; absent forms are null.
struct Panel {
  const ActivationGroup* groups;  // [input groups][kPanel]
  const ActivationTile* tiles;    // [input groups, padded to even with zeros]
  const float* floats;            // [inputs, padded to even][kPanel]
  const uint32_t* pairs;          // bfloat16 pairs [inputs / 2][kPanel]; for AMX [inputs / 32][kPanel][16], padded with zeros
};

}  // namespace tars
