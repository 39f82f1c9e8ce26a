// Repacking of row-major weights into tiles, and rows out of them again.
#pragma once
#include "format.h"

namespace tars {

struct Source {
  const uint8_t* codes;  // codes as in a QArray, two a byte if they have 4 bits, else one; or dense elements
  const uint8_t* scales;
  const uint8_t* mins;
  int64_t code_step, scale_step;  // bytes from a group's codes, scale and minimum to the next group's
};

void pack_tile(const Format& format, const Source& source, int64_t tile, uint8_t* out);

// Row `id` as float32.
void take_row(const Format& format, const uint8_t* data, int64_t id, float* out);

float to_float(DType type, const uint8_t* p);

}  // namespace tars
