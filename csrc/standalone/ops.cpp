// The ops for processes without Python: the schemas of torch.ops.qatkernels, and the CPU kernels that serve them. The
// registration happens when the library is loaded, as that of TORCH_LIBRARY does. A process that has Python imports
// qatkernels instead, never both.
#include <map>
#include <string>
#include <vector>

#include "../bindings/registry.h"

namespace qk {
namespace {

struct OpText {
  std::string name, arguments, contract;
  std::map<std::string, std::string> schemas;  // of the op and of the form that writes into given outputs, by name
};

const bool registered = [] {
  const std::vector<OpText> ops{
#include "ops.inc"
  };
  for (const OpText& op : ops) {
    state(op.name, op.name + "(" + op.arguments + ") -> ()", op.contract);
    for (const auto& [name, schema] : op.schemas) declare("qatkernels", name, schema);
  }
  return true;
}();

}  // namespace
}  // namespace qk
