// bfloat16 for loops that the compiler vectorises: values are loaded as float and stored rounded.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void store(float& out, float value) { out = value; }

// Rounds to the nearest, ties to even. A NaN stays one if its lower half is 0: those of bfloat16
// and those the processor makes are such.
inline void store(bfloat16& out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  out.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
