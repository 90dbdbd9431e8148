// What the arguments of an op must be and what its outputs are: the contracts of qatkernels/ops, in the language that
// qatkernels/ops/contract.py describes, evaluated without Python. Both check in the same order and say the same.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <c10/util/SmallVector.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace qk {

struct ContractData;

class Contract {
 public:
  struct Output {
    at::ScalarType type;
    c10::SmallVector<int64_t, 5> sizes;
  };
  using Outputs = c10::SmallVector<Output, 3>;

  // `schema` is that of the op without outputs; throws std::invalid_argument if the text is no contract.
  Contract(const c10::FunctionSchema& schema, const std::string& text);
  ~Contract();

  // Raises RuntimeError unless the arguments fit, naming the one that does not. Returns what the outputs are.
  Outputs check(at::ArrayRef<c10::IValue> arguments) const;
  // Raises ValueError unless an output that is written into is what check() said.
  void check_output(size_t index, const at::Tensor& given, const Output& wanted, at::Device device) const;

  size_t arguments() const;
  size_t outputs() const;
  // Whether a kernel takes this argument with any strides.
  bool strided(size_t argument) const;

 private:
  std::unique_ptr<ContractData> data_;
};

}  // namespace qk
