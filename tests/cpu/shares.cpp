// Tells which thread does what in a launch on the CPU, for tests/core/test_cpu_threads.py.
//
//   shares forward|backward THREADS,THREADS,... OUTER,ROWS,INNER,V_TYPE,W_TYPE,HUGE_ROWS ...
//
// It prints a line for each number of threads: a hash of all results; how many elements of every
// problem's w or grad_v were written outside of run(); and then, for every call of run(), "|" and
// these counts for every task. Tasks run one after the other. The written elements are cleared
// after each task, so that an element that is written twice counts twice.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/weight_norm.h"

namespace {

using namespace wnkernel;

constexpr size_t kAlign = 64, kBlock = 4096;

int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Numbers of one type, with the alignment of torch's tensors.
struct Array {
  DType type;
  int64_t count;
  std::vector<char> memory;

  Array(DType type, int64_t count) : type(type), count(count), memory(bytes() + kAlign) { clear(); }

  size_t bytes() const { return static_cast<size_t>(count * size_of(type)); }
  char* data() { return memory.data() + (kAlign - uintptr_t(memory.data()) % kAlign) % kAlign; }
  // Fills the array with a NaN of all ones, which no kernel writes.
  void clear() { std::memset(memory.data(), 0xff, memory.size()); }

  void set(int64_t k, double x) {
    const auto narrow = static_cast<float>(x);
    char* to = data() + k * size_of(type);
    if (type == DType::f64) std::memcpy(to, &x, 8);
    if (type == DType::f32) std::memcpy(to, &narrow, 4);
    if (type == DType::bf16) std::memcpy(to, reinterpret_cast<const char*>(&narrow) + 2, 2);
  }

  void set_random() {
    static uint64_t state = 1;
    for (int64_t k = 0; k < count; ++k) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      set(k, static_cast<double>(state >> 32) / (1u << 31) - 1);
    }
  }

  // Moves the elements that were written since the last call to another array, and returns their
  // number.
  int64_t take(Array& to) {
    static const std::vector<char> ones(kBlock, '\xff');
    const auto step = static_cast<size_t>(size_of(type));
    int64_t found = 0;
    for (size_t block = 0; block < bytes(); block += kBlock) {
      const size_t end = std::min(bytes(), block + kBlock);
      if (std::memcmp(data() + block, ones.data(), end - block) == 0) continue;
      for (size_t k = block; k < end; k += step) {
        if (std::memcmp(data() + k, ones.data(), step) == 0) continue;
        std::memcpy(to.data() + k, data() + k, step);
        std::memset(data() + k, 0xff, step);
        ++found;
      }
    }
    return found;
  }
};

struct Problem {
  RowView view;
  DType v_type, w_type;
  Array v, g, w, norm, grad_w, grad_v, grad_g, found;

  Problem(RowView view, DType v_type, DType w_type, int64_t huge_rows, bool is_backward)
      : view(view),
        v_type(v_type),
        w_type(w_type),
        v(v_type, view.numel()),
        g(v_type, view.rows),
        w(w_type, view.numel()),
        norm(accumulation(v_type), view.rows),
        grad_w(w_type, view.numel()),
        grad_v(v_type, view.numel()),
        grad_g(v_type, view.rows),
        found(is_backward ? v_type : w_type, view.numel()) {
    v.set_random();
    g.set_random();
    grad_w.set_random();
    for (int64_t row = 0; row < huge_rows; ++row) v.set(row * view.inner, 1e30);
  }

  Forward forward() {
    return {v.data(), g.data(), w.data(), norm.data(), view, v_type, v_type, w_type, norm.type, 0};
  }
  Backward backward() {
    return {grad_w.data(), v.data(),      g.data(), norm.data(),
            grad_v.data(), grad_g.data(), view,     v_type,
            v_type,        w_type,        0};
  }
};

std::vector<Problem> problems;
bool is_backward;
std::string text;  // the output for the calls of run()

std::string take_all() {
  std::string counts;
  for (Problem& p : problems)
    counts += " " + std::to_string((is_backward ? p.grad_v : p.w).take(p.found));
  return counts;
}

void run(int tasks, void (*body)(void*, int), void* context) {
  text += " |";
  for (int k = 0; k < tasks; ++k) {
    body(context, k);
    text += take_all();
  }
}

uint64_t hash(uint64_t h, Array& a) {
  for (size_t k = 0; k < a.bytes(); ++k)
    h = (h ^ static_cast<unsigned char>(a.data()[k])) * 1099511628211u;
  return h;
}

void launch(int threads, bool backward) {
  const auto count = static_cast<int64_t>(problems.size());
  std::vector<Forward> forwards;
  std::vector<Backward> backwards;
  for (Problem& p : problems) {
    forwards.push_back(p.forward());
    backwards.push_back(p.backward());
  }
  if (backward)
    backward_cpu(backwards.data(), count, {threads, run});
  else
    forward_cpu(forwards.data(), count, {threads, run});
}

std::vector<int64_t> numbers(const char* text) {
  std::vector<int64_t> found;
  for (char* end; *text; text = *end == ',' ? end + 1 : end)
    found.push_back(std::strtoll(text, &end, 10));
  return found;
}

}  // namespace

int main(int count, char** arguments) {
  is_backward = std::strcmp(arguments[1], "backward") == 0;
  for (int k = 3; k < count; ++k) {
    const auto n = numbers(arguments[k]);
    problems.emplace_back(RowView{n[0], n[1], n[2]}, DType(n[3]), DType(n[4]), n[5], is_backward);
  }
  if (is_backward) launch(1, /*backward=*/false);  // makes the norms
  for (const int64_t threads : numbers(arguments[2])) {
    for (Problem& p : problems) {
      p.found.clear();
      p.grad_g.clear();
      if (!is_backward) p.norm.clear();
    }
    text.clear();
    launch(static_cast<int>(threads), is_backward);
    const std::string outside = take_all();
    uint64_t h = 14695981039346656037u;
    for (Problem& p : problems) h = hash(hash(h, p.found), is_backward ? p.grad_g : p.norm);
    std::printf("%016llx%s%s\n", static_cast<unsigned long long>(h), outside.c_str(), text.c_str());
  }
}
