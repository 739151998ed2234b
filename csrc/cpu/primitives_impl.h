// The primitives of one instruction set. One translation unit per instruction set includes this
// file. It first defines WNKERNEL_ISA and WNKERNEL_VECTOR_BYTES and switches the compiler to that
// set.
//
// Nothing here may call a function template of the standard library, because the linker would merge
// its copies across instruction sets.
#pragma once
#include "primitives.h"
#include "vec.h"

// Tells gcc that the arrays of the next loop do not overlap; there are more arrays than gcc would
// check.
#if defined(__clang__)
#define WNKERNEL_NO_ALIAS
#else
#define WNKERNEL_NO_ALIAS _Pragma("GCC ivdep")
#endif

namespace wnkernel::cpu::WNKERNEL_ISA {

// Floats are added up in runs of this many elements; the sums of the runs are added as doubles.
constexpr int64_t kFloatRun = 8192;
constexpr int kUnroll = 4;      // independent sums along a row
constexpr int kWideUnroll = 8;  // vectors of column sums in registers
constexpr int64_t kStreams = 8;
constexpr int64_t kNarrowRows = 32;  // rows of memory of a narrow strip that are added up at a time
// From this length on, it pays to align the results of a row with cache lines.
constexpr int64_t kLongRow = 128;

template <class V, class W, bool backward>
struct KernelsOf {
  using A = typename AccumulationOf<V>::type;
  using X = std::conditional_t<backward, W, V>;    // y is multiplied with x
  using Out = std::conditional_t<backward, V, W>;  // the map writes out
  static constexpr int64_t N = kLanes<A>;
  // If all types are bf16, two vectors hold the even and the odd elements. A shift and a mask
  // unpack these, while consecutive elements would have to cross lanes. Sums may be added in any
  // fixed order.
  static constexpr bool kInterleaved = std::is_same_v<V, bf16> && std::is_same_v<W, bf16>;

  WNKERNEL_INLINE Vec<A> add_product(Vec<A> sum, const X* x, const V* y) {
    const Vec<A> vy = load<A>(y);
    if constexpr (backward) return sum + load<A>(x) * vy;
    return sum + vy * vy;
  }

  WNKERNEL_INLINE Vec<A> product_partial(const X* x, const V* y, int64_t n) {
    const Vec<A> vy = load_partial<A>(y, n);
    if constexpr (backward) return load_partial<A>(x, n) * vy;
    return vy * vy;
  }

  WNKERNEL_INLINE Vec<A> dot_run(const X* x, const V* y, int64_t n) {
    Vec<A> sum[kUnroll] = {};
    int64_t k = 0;
    for (; k + kUnroll * N <= n; k += kUnroll * N)
      for (int u = 0; u < kUnroll; u += 2) {
        const Vec2<A> vy = load_two<A, kInterleaved>(y + k + u * N);
        const Vec2<A> vx = backward ? load_two<A, kInterleaved>(x + k + u * N) : vy;
        sum[u] += vx.first * vy.first;
        sum[u + 1] += vx.second * vy.second;
      }
    for (; k + N <= n; k += N) sum[0] = add_product(sum[0], x + k, y + k);
    if (k < n) {
      Vec<A> tail = product_partial(x + k, y + k, n - k);
#if defined(WNKERNEL_ROUND_PRODUCT)
      if constexpr (backward) WNKERNEL_ROUND_PRODUCT(tail);
#endif
      sum[1] += tail;
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  static void dot_rows(const void* x_, const void* y_, int64_t rows, int64_t n, double* sums) {
    const X* x = static_cast<const X*>(x_);
    const V* y = static_cast<const V*>(y_);
    int64_t r = 0;
    for (; n <= kFloatRun && r + N <= rows; r += N) {  // these rows share their horizontal sums
      Vec<A> products[N];
      for (int k = 0; k < N; ++k, x += n, y += n)
        products[k] = n < N ? product_partial(x, y, n) : dot_run(x, y, n);
      const Vec<A> totals = horizontal_sums<A, 1>(products);
      for (int k = 0; k < N; ++k) sums[r + k] += totals[k];
    }
    for (; r < rows; ++r, x += n, y += n)
      for (int64_t k = 0; k < n; k += kFloatRun)
        sums[r] += horizontal_sum<A, WNKERNEL_VECTOR_BYTES>(
            dot_run(x + k, y + k, n - k < kFloatRun ? n - k : kFloatRun));
  }

  // Adds `outer` rows of memory up in registers, and then adds these sums to `u` vectors of column
  // sums. With two steps, errors grow with the number of rows in one step plus the number of steps.
  template <int u>
  WNKERNEL_INLINE void add_columns(const X* x, const V* y, int64_t outer, int64_t stride, A* sums) {
    Vec<A> sum[u];
    for (int k = 0; k < u; ++k) sum[k] = Vec<A>{};
    for (int64_t o = 0; o < outer; ++o, x += stride, y += stride)
      for (int k = 0; k < u; ++k) sum[k] = add_product(sum[k], x + k * N, y + k * N);
    for (int k = 0; k < u; ++k) store<A>(sums + k * N, load<A>(sums + k * N) + sum[k]);
  }

  static void dot_columns(const void* x_, const void* y_, int64_t outer, int64_t stride,
                          int64_t columns, void* sums_) {
    const X* x = static_cast<const X*>(x_);
    const V* y = static_cast<const V*>(y_);
    A* sums = static_cast<A*>(sums_);
    // A wide strip takes as few rows of memory at a time as the prefetcher can follow streams.
    const int64_t group = columns > kWideUnroll * N ? kStreams : kNarrowRows;
    for (int64_t o = 0; o < outer; o += group, x += group * stride, y += group * stride) {
      const int64_t rows = outer - o < group ? outer - o : group;
      int64_t c = 0;
      for (; c + kWideUnroll * N <= columns; c += kWideUnroll * N)
        add_columns<kWideUnroll>(x + c, y + c, rows, stride, sums + c);
      for (; c + N <= columns; c += N) add_columns<1>(x + c, y + c, rows, stride, sums + c);
      if (c == columns) continue;
      const int64_t n = columns - c;
      Vec<A> sum{};
      for (int64_t k = 0; k < rows; ++k)
        sum += product_partial(x + k * stride + c, y + k * stride + c, n);
      store_partial<A>(sums + c, load_partial<A>(sums + c, n) + sum, n);
    }
  }

  WNKERNEL_INLINE Vec<A> combine(Vec<A> a, Vec<A> b, Vec<A> x, Vec<A> y) {
    if constexpr (backward) return a * x - b * y;
    return a * y;
  }

  template <bool streaming>
  WNKERNEL_INLINE void put(Out* out, Vec<A> x) {
    if constexpr (streaming) {
      store_streaming<A>(out, x);
    } else {
      store<A>(out, x);
    }
  }

  WNKERNEL_INLINE void map_partial(const X* x, const V* y, Out* out, int64_t n, Vec<A> a,
                                   Vec<A> b) {
    const Vec<A> vx = backward ? load_partial<A>(x, n) : a;
    store_partial<A>(out, combine(a, b, vx, load_partial<A>(y, n)), n);
  }

  // Elements of out before the first cache line that its vectors fill. Their number is 0 if vectors
  // are shorter than lines, or if a partial vector costs more than alignment saves.
  WNKERNEL_INLINE int64_t until_line([[maybe_unused]] const Out* out) {
#if defined(WNKERNEL_MASKED_MOVES)
    constexpr uintptr_t kBytes = sizeof(Raw<Out, A>);
    if constexpr (kBytes == WNKERNEL_VECTOR_BYTES)
      return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % kBytes / sizeof(Out));
#endif
    return 0;
  }

  template <bool streaming>
  WNKERNEL_INLINE void map_row(const X* x, const V* y, Out* out, int64_t n, Vec<A> a, Vec<A> b) {
    int64_t k = 0;
    if (const int64_t head = until_line(out); head > 0 && n >= kLongRow) {
      map_partial(x, y, out, head, a, b);
      k = head;
    }
    if constexpr (kInterleaved)
      for (; k + 2 * N <= n; k += 2 * N) {
        const Vec2<A> vy = load_two<A, true>(y + k), vx = backward ? load_two<A, true>(x + k) : vy;
        store_interleaved<streaming>(
            out + k, {combine(a, b, vx.first, vy.first), combine(a, b, vx.second, vy.second)});
      }
    for (; k + N <= n; k += N)
      put<streaming>(out + k, combine(a, b, backward ? load<A>(x + k) : a, load<A>(y + k)));
    if (k < n) map_partial(x + k, y + k, out + k, n - k, a, b);
  }

  static void map_rows(const void* x_, const void* y_, void* out_, int64_t rows, int64_t n,
                       const void* a_, const void* b_, bool stream) {
    const X* x = static_cast<const X*>(x_);
    const V* y = static_cast<const V*>(y_);
    Out* out = static_cast<Out*>(out_);
    stream = stream && can_stream<A>(out, n, kInterleaved ? 2 : 1);
    for (int64_t r = 0; r < rows; ++r, x += n, y += n, out += n) {
      const Vec<A> a = Vec<A>{} + static_cast<const A*>(a_)[r];
      const Vec<A> b = backward ? Vec<A>{} + static_cast<const A*>(b_)[r] : Vec<A>{};
      if (n < N) {
        map_partial(x, y, out, n, a, b);
      } else if (stream) {
        map_row<true>(x, y, out, n, a, b);
      } else {
        map_row<false>(x, y, out, n, a, b);
      }
    }
    if (stream) finish_streaming();
  }

  template <bool streaming>
  WNKERNEL_INLINE void map_across(const X* x, const V* y, Out* out, int64_t columns, const A* a,
                                  const A* b) {
    int64_t c = 0;
    for (; c + N <= columns; c += N) {
      const Vec<A> va = load<A>(a + c), vb = backward ? load<A>(b + c) : va;
      put<streaming>(out + c, combine(va, vb, backward ? load<A>(x + c) : va, load<A>(y + c)));
    }
    if (c == columns) return;
    const int64_t n = columns - c;
    const Vec<A> va = load_partial<A>(a + c, n);
    map_partial(x + c, y + c, out + c, n, va, backward ? load_partial<A>(b + c, n) : va);
  }

  static void map_columns(const void* x_, const void* y_, void* out_, int64_t outer, int64_t stride,
                          int64_t columns, const void* a_, const void* b_, bool stream) {
    const X* x = static_cast<const X*>(x_);
    const V* y = static_cast<const V*>(y_);
    Out* out = static_cast<Out*>(out_);
    const A* a = static_cast<const A*>(a_);
    const A* b = static_cast<const A*>(b_);
    stream = stream && can_stream<A>(out, stride, 1) && columns % N == 0;
    for (int64_t o = 0; o < outer; ++o, x += stride, y += stride, out += stride) {
      if (stream) {
        map_across<true>(x, y, out, columns, a, b);
      } else {
        map_across<false>(x, y, out, columns, a, b);
      }
    }
    if (stream) finish_streaming();
  }

  static constexpr Kernels table() { return {dot_rows, dot_columns, map_rows, map_columns}; }
};

template <class A, class G>
struct FinishOf {
  using Range = SafeRange<A>;

  // Conditions are 0.0 and 1.0, because the compiler does not vectorise chains of bools.
  WNKERNEL_INLINE double inside(double x, double low, double high) {  // tests |x|; false for NaN
    const double magnitude = __builtin_fabs(x);
    return (magnitude >= low ? 1.0 : 0.0) * (magnitude <= high ? 1.0 : 0.0);
  }
  WNKERNEL_INLINE double either(double x, double y) { return x > y ? x : y; }
  WNKERNEL_INLINE double is_coefficient(double x) {
    return inside(x, Range::kCoefficientMin, Range::kCoefficientMax);
  }

  // What becomes of a norm before rows are divided by it: it is at least `least`, and `added` is
  // added. The bound is rounded as norms are: a g equal to eps gives w = v.
  WNKERNEL_INLINE double least_of(double eps) { return eps < 0.0 ? 0.0 : rounded<A>(eps); }
  WNKERNEL_INLINE double added_of(double eps) { return eps < 0.0 ? -eps : 0.0; }
  WNKERNEL_INLINE double divisor(double norm, double least, double added) {
    return (norm > least ? norm : least) + added;
  }

  WNKERNEL_INLINE int64_t count_nan(const double* sums, int64_t rows) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) count += sums[r] != sums[r];
    return count;
  }

  // These are plain loops with one exit, which the compiler turns into vectors of doubles.
  static int64_t forward(double* sums, const void* g, int64_t rows, double eps, bool as_g,
                         double forced, void* norm, void* a, void* b) {
    if (forced > 0) return forward_as<A, true>(sums, g, rows, eps, forced, norm, a, b);
    if constexpr (sizeof(A) == 4 && sizeof(G) == 2)
      if (as_g) return forward_as<G, false>(sums, g, rows, eps, 0, norm, a, nullptr);
    return forward_as<A, false>(sums, g, rows, eps, 0, norm, a, nullptr);
  }

  template <class Divisor, bool is_forced>
  WNKERNEL_INLINE int64_t forward_as(double* __restrict sums, const void* g_, int64_t rows,
                                     double eps, double forced, void* norm_, void* a_, void* b_) {
    const G* __restrict g = static_cast<const G*>(g_);
    A* __restrict norm = static_cast<A*>(norm_);
    A* __restrict a = static_cast<A*>(a_);
    A* __restrict b = static_cast<A*>(b_);
    const double least = least_of(eps), added = added_of(eps);
    WNKERNEL_NO_ALIAS
    for (int64_t r = 0; r < rows; ++r) {
      const double n = __builtin_sqrt(sums[r]), gr = to_double(g[r]);
      const double of_v = is_forced ? forced / divisor(n, least, added) : 1.0;
      const double of_norm = is_forced ? n * of_v : n;
      const double scale = gr / divisor(rounded<Divisor>(of_norm), least, added) * of_v;
      const double safe = inside(n, Range::kNormMin, Range::kNormMax) * is_coefficient(of_v) *
                          either(gr == 0.0 ? 1.0 : 0.0, is_coefficient(scale));
      norm[r] = static_cast<A>(of_norm);
      a[r] = safe != 0.0 ? static_cast<A>(scale) : A(1);
      if (is_forced) b[r] = safe != 0.0 ? static_cast<A>(of_v) : A(1);
      sums[r] = safe != 0.0 ? sums[r] : __builtin_nan("");
    }
    return count_nan(sums, rows);
  }

  static int64_t backward(double* __restrict sums, const void* g_, const void* norm_, int64_t rows,
                          double eps, void* grad_g_, void* a_, void* b_) {
    const G* __restrict g = static_cast<const G*>(g_);
    const A* __restrict norm = static_cast<const A*>(norm_);
    G* __restrict grad_g = static_cast<G*>(grad_g_);
    A* __restrict a = static_cast<A*>(a_);
    A* __restrict b = static_cast<A*>(b_);
    const double least = least_of(eps), added = added_of(eps);
    const double zero_is_safe = least + added >= Range::kNormMin ? 1.0 : 0.0;
    WNKERNEL_NO_ALIAS
    for (int64_t r = 0; r < rows; ++r) {
      const double n = norm[r], gr = to_double(g[r]), s = sums[r];
      const double d = divisor(n, least, added);
      const double inverse = 1.0 / d, projection = s * inverse, scale = gr * inverse;
      const double of_added = added > 0.0 ? d / n : 1.0;
      const double through_norm = scale * projection * inverse * of_added;
      const double vanished = (n == 0.0 ? 1.0 : 0.0) * zero_is_safe;
      const double clamped = either(n < least ? 1.0 : 0.0, vanished);
      const double along = clamped != 0.0 ? 0.0 : through_norm;
      const double zero =
          (s == 0.0 ? 1.0 : 0.0) * either(vanished, n >= Range::kZeroDotNormMin ? 1.0 : 0.0);
      const double coefficients =
          is_coefficient(scale) * either(clamped, either(zero, is_coefficient(along)));
      const double safe = either(vanished, inside(n, Range::kNormMin, Range::kNormMax)) *
                          either(zero, inside(s, Range::kDotMin, Range::kDotMax)) *
                          either(gr == 0.0 ? 1.0 : 0.0, coefficients);
      a[r] = safe != 0.0 ? static_cast<A>(scale) : A(0);
      b[r] = safe != 0.0 ? static_cast<A>(along) : A(0);
      sums[r] = safe != 0.0 ? projection : __builtin_nan("");
    }
    if (grad_g)
      for (int64_t r = 0; r < rows; ++r) from_double(sums[r], grad_g + r);
    return count_nan(sums, rows);
  }

  static constexpr Finish table() { return {forward, backward}; }
};

template <class A>
constexpr void fill(Finish (&of_g)[4]) {
  of_g[0] = FinishOf<A, f16>::table();
  of_g[1] = FinishOf<A, bf16>::table();
  of_g[2] = FinishOf<A, f32>::table();
  of_g[3] = FinishOf<A, f64>::table();
}

// This is a constant expression, so no code of this instruction set runs before the set is chosen.
constexpr InstructionSet make(const char* name) {
  InstructionSet set{};
  set.name = name;
#define WNKERNEL_FILL(name, v, w)                                              \
  set.forward[int(DType::v)][int(DType::w)] = KernelsOf<v, w, false>::table(); \
  set.backward[int(DType::v)][int(DType::w)] = KernelsOf<v, w, true>::table();
  WNKERNEL_CPU_PAIRS(WNKERNEL_FILL)
#undef WNKERNEL_FILL
  fill<f32>(set.finish[0]);
  fill<f64>(set.finish[1]);
  return set;
}

}  // namespace wnkernel::cpu::WNKERNEL_ISA
