// Arrays between two protected pages, and their numbers, which are converted by other means than
// those of csrc/cpu/elements.h.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/weight_norm.h"

namespace wnkernel::checks {

using Real = long double;

struct Format {
  int digits, least, most;  // digits with the hidden one; exponents of normal numbers
  int bytes;
};

inline Format format(DType t) {
  constexpr Format kFormats[] = {
      {11, -14, 15, 2}, {8, -126, 127, 2}, {24, -126, 127, 4}, {53, -1022, 1023, 8}};
  return kFormats[static_cast<int>(t)];
}

inline int exponent(Real x) {  // 2^exponent <= |x|
  int e;
  std::frexp(x, &e);
  return e - 1;
}

inline Real largest(Format f) { return std::ldexp(2 - std::ldexp(Real{1}, 1 - f.digits), f.most); }
inline Real smallest(Format f) { return std::ldexp(Real{1}, f.least); }
inline Real epsilon(Format f) { return std::ldexp(Real{1}, 1 - f.digits); }

// Rounds to the nearest number of a format.
inline Real round_to(Format f, Real x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const Real unit = std::ldexp(epsilon(f), std::max(exponent(x), f.least));
  const Real y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) <= largest(f) ? y : std::copysign(INFINITY, x);
}

inline Real decode_half(Format f, uint16_t bits) {
  const int field = bits >> (f.digits - 1) & ((1 << (16 - f.digits)) - 1);
  const int fraction = bits & ((1 << (f.digits - 1)) - 1);
  Real x;
  if (field == (1 << (16 - f.digits)) - 1)
    x = fraction ? NAN : INFINITY;
  else
    x = std::ldexp(Real(fraction + (field ? 1 << (f.digits - 1) : 0)),
                   f.least + 1 - f.digits + std::max(field - 1, 0));
  return bits & 0x8000 ? -x : x;
}

inline uint16_t encode_half(Format f, Real x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const int ones = (1 << (16 - f.digits)) - 1;
  x = std::fabs(round_to(f, x));
  if (std::isnan(x)) return static_cast<uint16_t>(sign | ones << (f.digits - 1) | 1);
  if (std::isinf(x)) return static_cast<uint16_t>(sign | ones << (f.digits - 1));
  const int e = x == 0 ? f.least : std::max(exponent(x), f.least);
  const int units = static_cast<int>(std::ldexp(x, f.digits - 1 - e));  // with the hidden digit
  return static_cast<uint16_t>(sign | (units + ((e - f.least) << (f.digits - 1))));
}

enum class Place { end, begin, middle };  // at the end or the begin of its pages, or at neither

class Array {
 public:
  Array(DType type, int64_t count, Place place) : type(type), count(count) {
    const size_t page = sysconf(_SC_PAGESIZE), used = (bytes() + page) / page * page;
    whole_ = used + 2 * page;
    void* const memory = mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + page, used, kOpen))
      std::abort();
    base_ = static_cast<char*>(memory);
    data = base_ + page;
    if (place == Place::end) data += used - bytes();
    if (place == Place::middle) data += std::min(used - bytes(), 3 * size_t(format(type).bytes));
    clear();
  }
  Array(Array&& other)
      : type(other.type),
        count(other.count),
        data(other.data),
        base_(other.base_),
        whole_(other.whole_) {
    other.base_ = nullptr;
  }
  ~Array() {
    if (base_) munmap(base_, whole_);
  }

  size_t bytes() const { return static_cast<size_t>(count) * format(type).bytes; }
  void clear() { std::memset(data, 0xff, bytes()); }  // a NaN that no kernel writes

  Real operator[](int64_t k) const {
    const char* at = data + k * format(type).bytes;
    if (type == DType::f64) return read<double>(at);
    if (type == DType::f32) return read<float>(at);
    return decode_half(format(type), read<uint16_t>(at));
  }
  void set(int64_t k, Real x) {
    char* at = data + k * format(type).bytes;
    if (type == DType::f64) return write(at, static_cast<double>(x));
    if (type == DType::f32) return write(at, static_cast<float>(x));
    write(at, encode_half(format(type), x));
  }
  bool same_bits(const Array& other) const { return std::memcmp(data, other.data, bytes()) == 0; }

  const DType type;
  const int64_t count;
  char* data;

 private:
  static constexpr int kOpen = PROT_READ | PROT_WRITE;
  template <class T>
  static T read(const char* at) {
    T x;
    std::memcpy(&x, at, sizeof x);
    return x;
  }
  template <class T>
  static void write(char* at, T x) {
    std::memcpy(at, &x, sizeof x);
  }
  char* base_;
  size_t whole_;
};

}  // namespace wnkernel::checks
