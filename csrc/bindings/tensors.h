// What the bindings of every family of ops share: names and checks of tensors, allocation, running a call where its
// tensors are, and the table of ops.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <string>
#include <vector>

#include "../common/call.h"
#include "../cpu/kernels.h"

namespace qk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using Constants = at::ArrayRef<double>;

std::string name_of(at::ScalarType type);
// As Python shows a tuple.
std::string shown(at::IntArrayRef values);
std::string shown(const Tensor& t);
DType dtype_of(const char* name, const Tensor& t);

// A new contiguous tensor; on a CPU from the pool, so that weight-sized results do not fault in fresh pages at every
// step.
Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, at::Device device);
Tensor like(const Tensor& t, OptionalType type = std::nullopt);

void check_device(const char* name, const Tensor& t, at::Device device);
void check_output(const char* name, const Tensor& out, const Tensor& shaped, at::ScalarType type);

void check_offsets(const Tensor& offsets, int64_t experts);
// The experts that have tokens, of `rows` tokens in all, from offsets on a CPU.
std::vector<Expert> experts_of(const Tensor& offsets, int64_t rows, const char* name);

// The constants of qatkernels.Grid.
Grid<double> grid_of(Constants c);

// What the ops of one family need of another.
void fake_quantize_dynamic_out(const Tensor& x, int64_t bits, Tensor out);

// f(begin, end) over [0, units) on torch's threads, at least `grain` at a time.
template <class F>
void parallel(int64_t units, F f, int64_t grain = 1) {
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { f(begin, end); });
}

// The same for units that take unequal time: whoever is done with a few takes the next few.
template <class F>
void parallel_in_turn(int64_t units, F f) {
  const int64_t threads = std::min<int64_t>(units, at::get_num_threads());
  const int64_t few = std::max<int64_t>(1, units / (16 * std::max<int64_t>(1, threads)));
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t unit; (unit = next.fetch_add(few)) < units;) f(unit, std::min(units, unit + few));
  });
}

// An op of the extension: how to make its function, and which devices it serves. A kernel that takes only some calls of
// an op on a device comes with an op `<op>_serves` there, of the same arguments, that says which.
struct Entry {
  torch::CppFunction (*make)();
  bool cpu, cuda;
};
using Ops = std::map<std::string, Entry>;
#define QK_ENTRY(ops, name, cpu, cuda) ops[#name] = {[] { return torch::CppFunction(TORCH_FN(name)); }, cpu, cuda}
#define QK_OP(ops, name) QK_ENTRY(ops, name, true, true)
#define QK_CPU_OP(ops, name) QK_ENTRY(ops, name, true, false)
#define QK_CUDA_OP(ops, name) QK_ENTRY(ops, name, false, true)

// One for each file of this folder.
void add_cross_entropy(Ops& ops);
void add_fake_quantize(Ops& ops);
void add_grouped(Ops& ops);
void add_lowbit(Ops& ops);
void add_krylov(Ops& ops);
void add_quant_linear(Ops& ops);
void add_train(Ops& ops);

}  // namespace qk
