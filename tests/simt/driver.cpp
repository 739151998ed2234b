// The functions that tests/simt/worker.py calls.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/launch.h"
#include "cuda/table.h"
#include "simt.h"

namespace wnkernel::cuda {

// These stand for pairs of types that are not linked in.
#define WNKERNEL_MISSING(name, v, w)                                                              \
  __attribute__((weak)) int forward_##name(const Forward* const*, int64_t, const CudaLaunch&) {   \
    return -1;                                                                                    \
  }                                                                                               \
  __attribute__((weak)) int backward_##name(const Backward* const*, int64_t, const CudaLaunch&) { \
    return -1;                                                                                    \
  }
WNKERNEL_PAIRS(WNKERNEL_MISSING)

}  // namespace wnkernel::cuda

namespace {

using namespace wnkernel;

std::vector<int64_t> reserved;

// Gives out blocks of exactly the requested size, filled with NaN.
struct Workspace {
  std::vector<std::unique_ptr<char[]>> blocks;

  static void* reserve(void* self, int64_t bytes) {
    const auto size = static_cast<size_t>(bytes);
    auto& blocks = static_cast<Workspace*>(self)->blocks;
    blocks.emplace_back(new char[size]);
    reserved.push_back(bytes);
    return std::memset(blocks.back().get(), 0xff, size);
  }
};

template <class T, class ToHalf, class ToFloat>
void round_all(const float* x, int64_t count, T* rounded, float* back, ToHalf narrow,
               ToFloat widen) {
  for (int64_t k = 0; k < count; ++k) {
    rounded[k] = narrow(x[k]);
    back[k] = widen(rounded[k]);
  }
}

}  // namespace

extern "C" {

int simt_sizeof_forward() { return sizeof(Forward); }
int simt_sizeof_backward() { return sizeof(Backward); }

int simt_takes(int v_type, int w_type) {
  return cuda_takes(static_cast<DType>(v_type), static_cast<DType>(w_type));
}

void simt_begin(int order, int64_t failing_launch, int ends, int processors, int mutant) {
  simt::state = {
      static_cast<simt::Order>(order), {}, failing_launch, 0, ends != 0, processors, mutant};
  reserved.clear();
}

int simt_forward(const Forward* problems, int64_t count, void* stream) {
  Workspace workspace;
  return forward_cuda(problems, count, {stream, &workspace, Workspace::reserve});
}

int simt_backward(const Backward* problems, int64_t count, void* stream) {
  Workspace workspace;
  return backward_cuda(problems, count, {stream, &workspace, Workspace::reserve});
}

// Both write to `to`, unless it is null, and return the number of launches, or of workspaces, since
// simt_begin().
int simt_launches(int64_t* to) {
  if (to)
    for (const auto& l : simt::state.launches) {
      *to++ = l.blocks;
      *to++ = l.threads;
      *to++ = reinterpret_cast<intptr_t>(l.stream);
      *to++ = static_cast<int64_t>(l.argument_bytes);
    }
  return static_cast<int>(simt::state.launches.size());
}

int simt_workspaces(int64_t* to) {
  if (to) std::copy(reserved.begin(), reserved.end(), to);
  return static_cast<int>(reserved.size());
}

void simt_numbers(int64_t* to) {
  for (const int64_t number :
       {int64_t{cuda::kThreads}, int64_t{cuda::kWarp}, int64_t{cuda::kVectorBytes},
        int64_t{cuda::kStripBytes}, int64_t{cuda::kRowVectors}, cuda::kFill, cuda::kSplitFrom,
        cuda::kStripTiles, cuda::kStripParts, cuda::kTilesOfMoreParts, int64_t{cuda::kFewLines},
        int64_t{cuda::kMostLines}})
    *to++ = number;
}

void simt_plan(int64_t outer, int64_t rows, int64_t inner, int element_bytes, int vector,
               int64_t places, int64_t* to) {
  const cuda::Plan p = cuda::make_plan({outer, rows, inner}, element_bytes, vector);
  const int per_block = cuda::parts_of_block(p, places);
  for (const int64_t field :
       {p.rows, p.inner, p.lines, p.pitch, p.numel, p.width, int64_t{p.strip_rows},
        int64_t{p.across}, int64_t{p.tiles}, int64_t{p.per_part}, int64_t{p.parts},
        static_cast<int64_t>(p.kind), int64_t{p.vector}, int64_t{p.log_x}, int64_t{p.log_across},
        int64_t{per_block}, blocks(p, per_block), partial_sums(p, element_bytes)})
    *to++ = field;
}

void simt_round_half(const float* x, int64_t count, __half* rounded, float* back) {
  round_all(x, count, rounded, back, __float2half_rn, __half2float);
}

void simt_round_bfloat16(const float* x, int64_t count, __nv_bfloat16* rounded, float* back) {
  round_all(x, count, rounded, back, __float2bfloat16_rn, __bfloat162float);
}

}  // extern "C"
