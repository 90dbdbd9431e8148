// What the arguments of an op must be and what its outputs are: the contracts of qatkernels/ops, in the language that
// qatkernels/ops/contract.py describes, evaluated without Python. Both check in the same order with the same messages;
// tests/ops/test_contract.py compares them.
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

  // `schema` is that of the op without outputs. Throws std::invalid_argument if the text is not a contract.
  Contract(const c10::FunctionSchema& schema, const std::string& text);
  ~Contract();

  // Raises RuntimeError if an argument does not fit; the message names it. Returns what the outputs are.
  Outputs check(at::ArrayRef<c10::IValue> arguments) const;
  // Raises ValueError if an output that will be written into is not what check() returned.
  void check_output(size_t index, const at::Tensor& given, const Output& wanted, at::Device device) const;

  size_t arguments() const;
  size_t outputs() const;
  const std::string& output_name(size_t index) const;
  // Whether a kernel takes this argument with any strides.
  bool strided(size_t argument) const;

 private:
  std::unique_ptr<ContractData> data_;
};

}  // namespace qk
