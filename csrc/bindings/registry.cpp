#include "registry.h"

#include <map>
#include <memory>
#include <vector>

#include "contract.h"
#include "tensors.h"
#include "text.h"

namespace qk {
namespace {

using torch::jit::Stack;

std::map<std::pair<std::string, c10::DispatchKey>, c10::KernelFunction>& table() {
  static auto& table = *new std::map<std::pair<std::string, c10::DispatchKey>, c10::KernelFunction>;
  return table;
}
std::map<std::string, std::shared_ptr<const Contract>>& contracts() {
  static auto& table = *new std::map<std::string, std::shared_ptr<const Contract>>;
  return table;
}

// What an op does with a kernel, which the end of its name says: allocate the outputs and return them, write into
// outputs that are given, or ask whether the kernel takes the call.
enum class Form { allocating, writing, asking };

struct Named {
  std::string op;
  std::string kernel;
  Form form;
};

Named named(const std::string& name) {
  for (const auto& [end, form] : {std::pair("_out", Form::writing), std::pair("_serves", Form::asking)}) {
    if (!name.ends_with(end)) continue;
    const std::string op = name.substr(0, name.size() - std::string(end).size());
    return {op, form == Form::asking ? name : op, form};
  }
  return {name, name, Form::allocating};
}

// Checks a call by the contract of its op, then runs the kernel. It works on a stack of arguments, so one class serves
// every op.
class Contracted final : public c10::OperatorKernel {
 public:
  Contracted(std::shared_ptr<const Contract> contract, c10::KernelFunction kernel, Form form)
      : contract_(std::move(contract)), kernel_(std::move(kernel)), form_(form) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    const size_t inputs = contract_->arguments(), outputs = contract_->outputs();
    const size_t first = stack->size() - inputs - (form_ == Form::writing ? outputs : 0);
    const at::ArrayRef<c10::IValue> arguments(stack->data() + first, inputs);
    const Contract::Outputs wanted = contract_->check(arguments);
    const at::Device device = device_of(arguments);
    for (size_t i = 0; i < inputs; ++i) {
      c10::IValue& argument = (*stack)[first + i];
      if (argument.isTensor() && !contract_->strided(i) && !argument.toTensor().is_contiguous())
        argument = argument.toTensor().contiguous();
    }
    if (form_ == Form::writing) {
      for (size_t i = 0; i < outputs; ++i)
        contract_->check_output(i, (*stack)[first + inputs + i].toTensor(), wanted[i], device);
    }
    if (form_ != Form::allocating) return kernel_.callBoxed(op, keys, stack);
    c10::SmallVector<c10::IValue, 3> made;
    for (const Contract::Output& output : wanted) {
      made.emplace_back(allocate(output.sizes, output.type, device));
      stack->push_back(made.back());
    }
    kernel_.callBoxed(op, keys, stack);  // pops the arguments and the outputs
    for (c10::IValue& output : made) stack->push_back(std::move(output));
  }

 private:
  static at::Device device_of(at::ArrayRef<c10::IValue> arguments) {
    for (const c10::IValue& argument : arguments)
      if (argument.isTensor()) return argument.toTensor().device();
    TORCH_INTERNAL_ASSERT(false, "an op without tensors");
  }

  std::shared_ptr<const Contract> contract_;
  c10::KernelFunction kernel_;
  Form form_;
};

// Checks a call by a contract and describes the outputs. For tests.
class ContractOnly final : public c10::OperatorKernel {
 public:
  explicit ContractOnly(std::shared_ptr<const Contract> contract) : contract_(std::move(contract)) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) const {
    std::string text;
    size_t index = 0;
    for (const Contract::Output& output : contract_->check(torch::jit::last(*stack, contract_->arguments())))
      text += contract_->output_name(index++) + ": " + name_of(output.type) + " " + shape_string(output.sizes) + "\n";
    torch::jit::drop(*stack, contract_->arguments());
    stack->emplace_back(std::move(text));
  }

 private:
  std::shared_ptr<const Contract> contract_;
};

std::shared_ptr<const Contract> contract_of(const std::string& op) {
  const auto found = contracts().find(op);
  TORCH_CHECK(found != contracts().end(), "the contract of ", op, " was not stated");
  return found->second;
}

template <class Kernel>
void register_boxed(const std::string& ns, const std::string& name, c10::DispatchKey key, std::unique_ptr<Kernel> k) {
  library(torch::Library::IMPL, ns, key)
      .impl(name.c_str(), torch::CppFunction::makeFromBoxedKernel(c10::BoxedKernel::makeFromFunctor(std::move(k))));
}

}  // namespace

KernelEntry::KernelEntry(const char* op, c10::DispatchKey key, c10::KernelFunction kernel) {
  table().emplace(std::pair(op, key), std::move(kernel));
}

torch::Library& library(torch::Library::Kind kind, const std::string& ns, std::optional<c10::DispatchKey> key) {
  static auto& libraries = *new std::vector<std::unique_ptr<torch::Library>>;
  libraries.push_back(std::make_unique<torch::Library>(kind, ns, key, __FILE__, __LINE__));
  return *libraries.back();
}

bool serves(const std::string& name, c10::DispatchKey key) { return table().count({named(name).kernel, key}) > 0; }

void state(const std::string& op, const std::string& schema, const std::string& contract) {
  contracts()[op] = std::make_shared<const Contract>(torch::schema(schema.c_str()), contract);
}

void implement(const std::string& ns, const std::string& name, c10::DispatchKey key) {
  TORCH_CHECK(serves(name, key), "this build has no kernel for ", name, " on ", key);
  const Named found = named(name);
  register_boxed(ns, name, key,
                 std::make_unique<Contracted>(contract_of(found.op), table().at({found.kernel, key}), found.form));
}

void declare(const std::string& ns, const std::string& name, const std::string& schema) {
  library(torch::Library::FRAGMENT, ns, std::nullopt).def(torch::schema(schema.c_str()));
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA})
    if (serves(name, key)) implement(ns, name, key);
}

void declare_check(const std::string& ns, const std::string& name, const std::string& schema) {
  library(torch::Library::FRAGMENT, ns, std::nullopt).def(torch::schema(schema.c_str()));
  register_boxed(ns, name, c10::DispatchKey::CPU, std::make_unique<ContractOnly>(contract_of(name)));
}

}  // namespace qk
