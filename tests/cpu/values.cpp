// Compares values, gradients and bits of the CPU kernels with the formula in 80 bits, for
// tests/core/test_cpu_values.py.
//
//   values [MUTANT]     exits with 1 and prints one line if something is wrong
//
// Arrays touch a protected page at their end or their begin, so an access beyond them ends the
// program, whatever instruction makes it. Threads are real threads.
#include <string>
#include <thread>
#include <vector>

#include "arrays.h"

int wnkernel_mutant = 0;

namespace {

using namespace wnkernel;
using namespace wnkernel::checks;

constexpr DType f16 = DType::f16, bf16 = DType::bf16, f32 = DType::f32, f64 = DType::f64;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::_Exit(1);
}

uint64_t state = 1;
Real random_number() {  // -1 to 1
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<Real>(state >> 32) / (1u << 31) - 1;
}

// What the rows of a weight are like. Every third row is ordinary.
enum class Rows {
  ordinary,
  huge,
  tiny,
  zero,
  infinite,
  nan,
  no_g,
  clamped,
  signs,
  no_grad,
  cancels,
  faint,      // products of v and grad_w lose digits
  vanishing,  // products of v and grad_w are 0
  steep,      // coefficients leave the range
  at_bound,   // g is eps rounded to a norm, and numbers are ties of half types
  subnormal,  // grad_w is subnormal, too
  uneven,     // every second element is subnormal, some blocks and the last element are 0
  crossed,    // v is large where grad_w is small
  no_v,       // one grad_w is infinite, too
};

struct Case {
  RowView view;
  DType v_type = f32, g_type = f32, w_type = f32;
  Rows rows = Rows::ordinary;
  Real eps = 0;
  Place place = Place::end;
  bool want_v = true, want_g = true;
  int64_t first_checked = 0;  // the first row that is checked
  Real forced = 0;
  bool in_place = false;  // w takes the place of v

  std::string name() const {
    const int64_t n[] = {view.outer,  view.rows,   view.inner, int(v_type),
                         int(g_type), int(w_type), int(rows),  int(place)};
    std::string text;
    for (int64_t k : n) text += std::to_string(k) + " ";
    return text + "eps " + std::to_string(double(eps)) + " forced " +
           std::to_string(double(forced)) + (in_place ? " in place" : "");
  }
};

struct Weight {
  Case c;
  Array v, g, w, norm, grad_w, grad_v, grad_g;
  std::vector<Real> first_v;  // before the launch

  explicit Weight(const Case& c)
      : c(c),
        v(c.v_type, c.view.numel(), c.place),
        g(c.g_type, c.view.rows, c.place),
        w(c.w_type, c.view.numel(), c.place),
        norm(accumulation(c.v_type), c.view.rows, c.place),
        grad_w(c.w_type, c.view.numel(), c.place),
        grad_v(c.v_type, c.view.numel(), c.place),
        grad_g(c.g_type, c.view.rows, c.place) {
    state = 1;
    for (int64_t row = 0; row < c.view.rows; ++row) fill(row);
    for (int64_t k = 0; k < c.view.numel(); ++k) first_v.push_back(v[k]);
  }

  void reset() {
    for (Array* result : {&w, &norm, &grad_v, &grad_g}) result->clear();
    if (c.forced > 0 || c.in_place)
      for (int64_t k = 0; k < c.view.numel(); ++k) v.set(k, first_v[k]);
  }
  const Array& result() const { return c.in_place ? v : w; }

  void fill(int64_t row) {
    const Rows kind = row % 3 == 1 || c.view.rows < 2 ? c.rows : Rows::ordinary;
    const bool wide = c.v_type == f64, narrow = c.v_type == f16;
    const int range = wide ? 600 : narrow ? 14 : 80;  // only squares leave the range of the type
    const int little = wide ? 350 : narrow ? 12 : 40;
    int v_size = 0, grad_size = 0;
    if (kind == Rows::huge) v_size = range;
    if (kind == Rows::tiny) v_size = narrow ? -18 : -range;
    if (kind == Rows::faint || kind == Rows::vanishing || kind == Rows::steep) v_size = -little;
    if (kind == Rows::faint) grad_size = wide ? -690 : -100;
    if (kind == Rows::vanishing) grad_size = wide ? -720 : -115;
    if (kind == Rows::signs) v_size = 3;
    if (kind == Rows::subnormal) v_size = subnormal(c.v_type), grad_size = subnormal(c.w_type);
    if (kind == Rows::uneven) v_size = format(c.v_type).least / 2;
    const Real size = std::ldexp(Real{1}, v_size), first = random_number();
    int64_t n = 0;
    each(row, [&](int64_t k) {
      Real x = random_number() * size;
      if (kind == Rows::zero || kind == Rows::no_v) x = 0;
      if (kind == Rows::huge && n + 1 == c.view.row_size()) x = std::ldexp(x, -2 * range);
      if (kind == Rows::signs || kind == Rows::cancels) x = n % 2 ? size : -size;
      if (n == c.view.row_size() / 2 && kind == Rows::infinite) x = INFINITY;
      if (n == c.view.row_size() / 2 && kind == Rows::nan) x = NAN;
      if (kind == Rows::at_bound) {
        const int bits = n % 2 ? 8 : 11;  // one digit more than bf16 or f16 has
        x = std::ldexp(std::floor(std::fabs(x) * (1 << (bits - 1))) * 2 + 1 + (1 << bits), -24);
      }
      if (kind == Rows::uneven && n % 2) x = std::ldexp(x, subnormal(c.v_type) - v_size);
      if (kind == Rows::uneven && (n / 128 % 2 || n + 1 == c.view.row_size())) x = 0;
      if (kind == Rows::crossed) x = std::ldexp(x, crossed(c.v_type, n % 2));
      v.set(k, x);
      Real y = std::ldexp(random_number(), grad_size);
      if (kind == Rows::crossed) y = std::ldexp(y, crossed(c.w_type, n % 2 == 0));
      if (n == c.view.row_size() / 2 && kind == Rows::no_v) y = INFINITY;
      if (kind == Rows::no_grad) y = 0;
      if (kind == Rows::cancels) y = n / 2 % 2 ? first : -first;
      grad_w.set(k, y);
      ++n;
    });
    Real scale = random_number() + 1.5L;
    if (kind == Rows::no_g) scale = 0;
    if (kind == Rows::signs) scale = std::sqrt(Real(n)) * size;
    if (kind == Rows::steep) scale = std::ldexp(scale, wide ? 300 : narrow ? 0 : 40);
    if (kind == Rows::at_bound) scale = 1;
    if (kind == Rows::uneven) scale = std::ldexp(scale, format(c.g_type).most / 3);
    g.set(row, scale);
  }

  // These are exponents. subnormal() gives numbers with a third of their digits. crossed() gives
  // large numbers, or numbers so small that their product with a large one loses digits when both
  // are relative to large ones.
  static int subnormal(DType t) { return format(t).least - format(t).digits * 2 / 3; }
  static int crossed(DType t, bool small) { return format(t).most / 2 + small * subnormal(t); }

  template <class F>
  void each(int64_t row, F&& f) const {
    for (int64_t o = 0; o < c.view.outer; ++o)
      for (int64_t i = 0; i < c.view.inner; ++i) f((o * c.view.rows + row) * c.view.inner + i);
  }

  Forward forward() const {
    const DType acc = accumulation(c.v_type);
    // The kernels round norms to the type of g for one norm of a whole tensor of a half type.
    const bool as_g =
        c.view.rows == 1 && format(c.g_type).bytes == 2 && format(c.v_type).bytes == 2;
    return {v.data,
            g.data,
            result().data,
            norm.data,
            c.view,
            c.v_type,
            c.g_type,
            c.w_type,
            as_g && c.forced == 0 ? c.g_type : acc,
            static_cast<double>(c.eps),
            static_cast<double>(c.forced)};
  }
  Backward backward() const {
    return {grad_w.data,
            v.data,
            g.data,
            norm.data,
            c.want_v ? grad_v.data : nullptr,
            c.want_g ? grad_g.data : nullptr,
            c.view,
            c.v_type,
            c.g_type,
            c.w_type,
            static_cast<double>(c.eps)};
  }

  void check() const {
    for (int64_t row = c.first_checked; row < c.view.rows; ++row) check_row(row);
  }
  void check_row(int64_t row) const;
  void compare(const char* what, const Array& of, int64_t k, Real want, Real scale) const;
};

// The result is rounded once, to nearest; tests/reference.py bounds the error before that. A double
// that is computed in floats has at least the unit of subnormal floats.
void Weight::compare(const char* what, const Array& of, int64_t k, Real want, Real scale) const {
  const Format f = format(of.type), acc = format(accumulation(c.v_type));
  const Real relative = (2 + 4 * std::sqrt(Real(c.view.row_size()))) * epsilon(acc);
  const bool normal = std::isfinite(want) && std::fabs(want) >= smallest(f);
  const Real unit = std::max(std::ldexp(epsilon(f), normal ? exponent(want) : f.least),
                             smallest(acc) * epsilon(acc));
  const Real got = of[k], error = std::fabs(got - want);
  if (std::isnan(want) ? std::isnan(got) : got == want) return;
  if (error <= relative * scale + unit / 2 * 1.001L) return;
  if (std::fabs(want) > largest(f) * (1 - relative) && std::fabs(got) >= largest(f)) return;
  char text[200];
  std::snprintf(text, sizeof text, " %s[%lld]: %.9Lg, not %.9Lg", what, (long long)k, got, want);
  fail(c.name() + text);
}

void Weight::check_row(int64_t row) const {
  const Format acc = format(accumulation(c.v_type));
  const Format of_divisor = format(forward().divisor_type);
  const Real least = c.eps < 0 ? 0 : round_to(acc, c.eps), added = c.eps < 0 ? -c.eps : 0;
  const auto divisor = [&](Real n) { return (n < least ? least : n) + added; };
  Real squares = 0, s = 0, terms = 0;
  each(row, [&](int64_t k) { squares += first_v[k] * first_v[k]; });
  const Real first_n = std::sqrt(squares), gr = g[row];
  const Real to_v = c.forced > 0 ? c.forced / divisor(first_n) : 1, n = first_n * to_v;
  const Real held = round_to(of_divisor, n);
  const bool normal = held >= smallest(of_divisor) && held <= largest(of_divisor);
  const Real forward_d = divisor(normal ? held : n);
  compare("norm", norm, row, n, n);
  each(row, [&](int64_t k) {
    const Real new_v = first_v[k] * to_v, want = gr * (new_v / (std::isnan(n) ? n : forward_d));
    compare("w", result(), k, want, std::fabs(want));
    if (c.forced > 0) compare("v", v, k, new_v, std::fabs(new_v));
    if (gr == forward_d && c.forced == 0 && w[k] != round_to(format(c.w_type), v[k]))
      fail(c.name() + " w is not v, of which g is the norm");
  });
  // The norm of a new v counts as it was before v was rounded, except in rows at the ends of the
  // range, whose norm is computed again.
  const bool coarse = c.forced > 0 && format(c.v_type).bytes == 2 && c.rows != Rows::ordinary;
  if (c.in_place || coarse) return;
  const Real saved_n = c.forced > 0 ? norm[row] : n, d = divisor(saved_n);
  each(row, [&](int64_t k) {
    s += grad_w[k] * (v[k] / d);
    terms += std::fabs(grad_w[k] * (v[k] / d));
  });
  if (c.want_g) compare("grad_g", grad_g, row, s, terms);
  const bool clamped = n < least || (added > 0 && n == 0);
  const Real of_added = clamped ? 0 : added > 0 ? d / saved_n : 1;
  const Real through = clamped ? 0 : s * of_added, size = clamped ? 0 : terms * of_added;
  if (c.want_v)
    each(row, [&](int64_t k) {
      const Real u = clamped ? 0 : v[k] / d;
      compare("grad_v", grad_v, k, gr / d * (grad_w[k] - u * through),
              std::fabs(gr / d) * (std::fabs(grad_w[k]) + std::fabs(u) * size));
    });
}

void run(int tasks, void (*body)(void*, int), void* context) {
  std::vector<std::thread> threads;
  for (int k = 0; k < tasks; ++k) threads.emplace_back(body, context, k);
  for (std::thread& thread : threads) thread.join();
}

void launch(std::vector<Weight>& weights, int threads) {
  std::vector<Forward> forwards;
  std::vector<Backward> backwards;
  for (Weight& weight : weights) {
    weight.reset();
    forwards.push_back(weight.forward());
    backwards.push_back(weight.backward());
  }
  const auto count = static_cast<int64_t>(weights.size());
  forward_cpu(forwards.data(), count, {threads, run});
  backward_cpu(backwards.data(), count, {threads, run});
}

void check_same_bits(const std::vector<Weight>& some, const std::vector<Weight>& others,
                     const std::string& what) {
  for (size_t k = 0; k < some.size(); ++k) {
    const Weight &a = some[k], &b = others[k];
    if (!a.w.same_bits(b.w) || !a.norm.same_bits(b.norm) || !a.grad_v.same_bits(b.grad_v) ||
        !a.grad_g.same_bits(b.grad_g) || !a.v.same_bits(b.v))
      fail(a.c.name() + " other bits with " + what);
  }
}

// Checks that each weight alone is right, and that the list has the same bits with any number of
// threads.
void check(const std::vector<Case>& cases) {
  std::vector<Weight> alone;
  for (const Case& c : cases) {
    std::vector<Weight> one;
    one.emplace_back(c);
    launch(one, 1);
    one[0].check();
    alone.push_back(std::move(one[0]));
  }
  std::vector<Weight> together;
  for (const Case& c : cases) together.emplace_back(c);
  for (const int threads : {1, 2, 5}) {
    launch(together, threads);
    check_same_bits(alone, together, std::to_string(threads) + " threads");
  }
}

// Rows of all lengths around a vector; rows in blocks that share their sums; rows beyond a run of
// floats; long and short runs that are cut into chunks; narrow and wide strips in one phase and in
// two.
const RowView kSmall[] = {
    {1, 5, 1},  {1, 3, 3},   {1, 40, 7},  {1, 9, 15},  {1, 17, 16}, {1, 33, 33},  {1, 6, 63},
    {1, 5, 67}, {1, 3, 131}, {1, 19, 96}, {2, 3, 300}, {3, 1, 7},   {67, 5, 3},   {35, 3, 15},
    {33, 2, 1}, {50, 70, 3}, {9, 7, 41},  {18, 40, 3}, {2, 130, 1}, {17, 33, 10}, {100, 1, 3},
};
const RowView kLarge[] = {
    {1, 300, 5},   {1, 1030, 4},  {1, 3, 8193},  {1, 2, 9001},  {1, 4, 20011}, {1, 130, 257},
    {1, 2, 70001}, {300, 2, 300}, {5, 1, 16385}, {4, 2, 33000}, {90000, 1, 1}, {257, 3, 255},
    {70, 80, 30},  {3000, 40, 1}, {1150, 17, 1}, {900, 10, 40}, {267, 300, 2}, {70001, 2, 1},
    {41, 701, 3},  {90, 1501, 3}, {600, 3, 100}, {5170, 2, 3},  {24, 2050, 2},
};
const DType kTypes[] = {f16, bf16, f32, f64};
#define WNKERNEL_PAIR(name, v, w) {v, w},
const DType kPairs[][2] = {WNKERNEL_CPU_PAIRS(WNKERNEL_PAIR)};
#undef WNKERNEL_PAIR
const Rows kRows[] = {Rows::huge,   Rows::tiny,      Rows::zero,  Rows::infinite, Rows::nan,
                      Rows::no_g,   Rows::clamped,   Rows::signs, Rows::no_grad,  Rows::cancels,
                      Rows::faint,  Rows::vanishing, Rows::steep, Rows::at_bound, Rows::subnormal,
                      Rows::uneven, Rows::crossed,   Rows::no_v};

Case with(Case c, Rows rows) {
  c.rows = rows;
  // eps is larger than some norms and smaller than others, or larger than all of them.
  if (rows == Rows::at_bound)
    c.eps = c.v_type == f64 ? 1 : 1 + 0x1p-24L - 0x1p-40L;  // 1 as a float
  if (rows == Rows::no_v) c.eps = 0x1p-20;
  if (rows == Rows::clamped) c.eps = std::sqrt(Real(c.view.row_size()) / 3);
  return c;
}

void check_all() {
  std::vector<Case> cases;
  for (const RowView& view : kSmall)
    for (const auto& [v_type, w_type] : kPairs)
      for (const Place place : {Place::end, Place::begin, Place::middle})
        cases.push_back({view, v_type, v_type, w_type, Rows::ordinary, 0, place});
  for (const auto& [v, w] : kPairs)
    for (const DType g : kTypes)
      cases.push_back({{3, 4, 19}, v, g, w}), cases.push_back({{1, 5, 70}, v, g, w});
  check(cases);
  cases.clear();
  for (const Rows rows : kRows) {
    // Every view with every kind of rows, but with every second pair of types only, in turns.
    int turn = 0;
    for (const RowView& view : kSmall)
      for (const auto& [v_type, w_type] : kPairs)
        if (++turn % 2) cases.push_back(with({view, v_type, v_type, w_type}, rows));
    check(cases);
    cases.clear();
  }
  for (const auto& [v_type, w_type] : kPairs) {
    const Case c{{3, 4, 19}, v_type, f32, w_type};
    for (const Real eps : {0x1p-20L, 0x1p-77L, 0x1p-597L})
      cases.push_back({c.view, v_type, f32, w_type, Rows::tiny, eps});
    cases.push_back({c.view, v_type, f32, w_type, Rows::zero, 0x1p-20});
    for (const Rows rows : {Rows::infinite, Rows::nan})
      cases.push_back({c.view, v_type, f32, w_type, rows, 4});
    for (Case part : {c, with(c, Rows::tiny)}) {
      part.want_g = false;
      cases.push_back(part);
      part.want_g = true, part.want_v = false;
      cases.push_back(part);
    }
  }
  check(cases);
  for (const DType type : {f32, bf16, f64}) {
    cases.clear();
    for (const RowView& view : kLarge) cases.push_back({view, type, type, type});
    check(cases);
  }
  cases.clear();
  for (const RowView& view : kLarge) {
    for (const Rows rows : {Rows::huge, Rows::nan, Rows::clamped})
      cases.push_back(with({view}, rows));
    Case part{view};
    part.want_v = false;
    cases.push_back(part);
  }
  Case many_long{{1, 258, 65537}};  // more rows than a thread finishes at a time
  many_long.first_checked = 255;
  cases.push_back(many_long);
  check(cases);
}

// An eps that is added, norms that are forced, and results that take the place of v.
void check_forced() {
  std::vector<Case> cases;
  const auto add = [&](Case c) {
    c.eps = -0x1p-7L, c.forced = 3;
    cases.push_back(c);
    c.in_place = true, c.w_type = c.v_type, c.eps = 0, c.forced = 0;
    cases.push_back(c);
  };
  for (const auto& [v, w] : kPairs) {
    for (const RowView& view : kSmall) add({view, v, f32, w});
    for (const Rows rows : {Rows::huge, Rows::tiny, Rows::zero, Rows::nan, Rows::subnormal})
      for (const RowView& view : {RowView{1, 33, 33}, {1, 6, 600}, {67, 5, 3}})
        add({view, v, f32, w, rows});
    cases.push_back({{1, 33, 33}, v, f32, w, Rows::zero, -0x1p-7L});
    cases.push_back({{1, 33, 33}, v, f32, w, Rows::clamped, 9, Place::end, true, true, 0, 3});
  }
  for (const RowView& view : {RowView{1, 2, 70001}, {257, 3, 255}, {3000, 40, 1}, {90, 1501, 3}})
    for (const Rows rows : {Rows::ordinary, Rows::huge}) add({view, f32, f32, bf16, rows});
  check(cases);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) wnkernel_mutant = std::atoi(arguments[1]);
  check_all();
  check_forced();
  std::printf("%s\n", cpu_instruction_set());
}
