#include "contract.h"

#include <algorithm>
#include <map>
#include <sstream>
#include <stdexcept>
#include <variant>

#include "expression.h"
#include "text.h"

namespace qk {
namespace {

using at::ScalarType;
using at::Tensor;

constexpr ScalarType kFloats[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

// Allowed dtypes: fixed ones, and those that depend on arguments.
struct Dtypes {
  enum Kind { fixed, any_float, like, narrow, wide, scale, or_else, code };
  struct Part {
    Kind kind;
    ScalarType type = at::kFloat;        // fixed
    size_t argument = 0, otherwise = 0;  // of like, narrow, wide, scale, or_else
    Expression number{};                 // of code
  };
  std::vector<Part> parts;
};

struct Dimension {
  std::string text;
  bool star = false;             // the name is that of any number of dimensions
  std::optional<size_t> name{};  // the slot of the name, unless this is an expression
  Expression expression{};
  std::optional<Expression> only_if{};
};

struct Shape {
  std::vector<Dimension> dimensions;
  bool one_element = false;
};

struct Argument {
  size_t index;
  Dtypes dtypes;
  std::optional<Shape> shape;
};

struct Requirement {
  Expression condition;
  std::vector<std::pair<std::string, std::optional<Expression>>>
      message;  // pieces of text, each with the value after it
};

struct Let {
  size_t slot;
  Expression expression;
};

struct OutputRule {
  std::string name;
  Dtypes dtypes;
  Shape shape;
  std::optional<Expression> condition;
  Shape otherwise;
};

}  // namespace

struct ContractData {
  std::vector<std::string> names;  // of the arguments
  std::vector<bool> written, strided;
  std::map<std::string, size_t> slots;
  std::vector<std::variant<Argument, Requirement, Let>> statements;
  std::vector<OutputRule> outputs;
};

namespace {

std::string stripped(const std::string& text) {
  const size_t first = text.find_first_not_of(' '), last = text.find_last_not_of(' ');
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

// Splits a text at the separators outside parentheses, and drops empty parts.
std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts{""};
  int depth = 0;
  for (const char c : text) {
    depth += (c == '(') - (c == ')');
    if (c == separator && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (std::string& part : parts) part = stripped(part);
  parts.erase(std::remove(parts.begin(), parts.end(), ""), parts.end());
  return parts;
}

// Reads the lines of a contract.
class Reader {
 public:
  explicit Reader(ContractData& data) : data_(data) {}

  void read(const std::string& line) {
    if (line.starts_with("require ")) {
      const size_t end = line.find("; ");
      data_.statements.push_back(Requirement{expression(line.substr(8, end - 8)), message(line.substr(end + 2))});
    } else if (line.starts_with("let ")) {
      const size_t end = line.find(" = ");
      data_.statements.push_back(Let{slot_of(line.substr(4, end - 4)), expression(line.substr(end + 3))});
    } else if (line.starts_with("-> ")) {
      data_.outputs.push_back(output(line.substr(3)));
    } else {
      data_.statements.push_back(argument(line));
    }
  }

 private:
  size_t slot_of(const std::string& name) { return data_.slots.try_emplace(name, data_.slots.size()).first->second; }
  Expression expression(const std::string& text) {
    return Expression::parse(text, [this](const std::string& name) { return slot_of(name); });
  }
  size_t argument_of(const std::string& name) const {
    const auto found = std::find(data_.names.begin(), data_.names.end(), name);
    if (found == data_.names.end()) throw std::invalid_argument("a contract names no argument " + name);
    return found - data_.names.begin();
  }

  std::vector<std::pair<std::string, std::optional<Expression>>> message(const std::string& text) {
    std::vector<std::pair<std::string, std::optional<Expression>>> parts;
    for (size_t at = 0; at < text.size();) {
      const size_t open = text.find('{', at), close = text.find('}', at);
      if (open == std::string::npos) {
        parts.emplace_back(text.substr(at), std::nullopt);
        break;
      }
      parts.emplace_back(text.substr(at, open - at), expression(text.substr(open + 1, close - open - 1)));
      at = close + 1;
    }
    return parts;
  }

  Dtypes dtypes(const std::string& text) {
    static const std::map<std::string, ScalarType> fixed{
        {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}, {"float64", at::kDouble},
        {"int8", at::kChar},     {"uint8", at::kByte},        {"int32", at::kInt},    {"int64", at::kLong}};
    static const std::map<std::string, Dtypes::Kind> kinds{{"like", Dtypes::like},
                                                           {"narrow", Dtypes::narrow},
                                                           {"wide", Dtypes::wide},
                                                           {"scale", Dtypes::scale},
                                                           {"default", Dtypes::or_else}};
    Dtypes found;
    for (const std::string& part : split(text, '|')) {
      const size_t open = part.find('(');
      const std::string kind = part.substr(0, open);
      const std::string of = open == std::string::npos ? "" : part.substr(open + 1, part.rfind(')') - open - 1);
      if (kind == "float") {
        found.parts.push_back({Dtypes::any_float});
      } else if (kind == "code") {
        found.parts.push_back({Dtypes::code, at::kFloat, 0, 0, expression(of)});
      } else if (const auto named = kinds.find(kind); named != kinds.end()) {
        const auto arguments = split(of, ',');
        found.parts.push_back(
            {named->second, at::kFloat, argument_of(arguments.front()), argument_of(arguments.back())});
      } else {
        if (!fixed.count(kind)) throw std::invalid_argument("a contract has no dtype " + part);
        found.parts.push_back({Dtypes::fixed, fixed.at(kind)});
      }
    }
    return found;
  }

  // "[*T, N, row_bytes(K, bits)]" or "one"
  Shape shape(const std::string& text) {
    if (text == "one") return {{}, true};
    Shape found;
    for (std::string part : split(text.substr(1, text.size() - 2), ',')) {
      Dimension dimension;
      const size_t condition = part.rfind(" if ");
      if (condition != std::string::npos && part.find(" else ") == std::string::npos) {
        dimension.only_if = expression(part.substr(condition + 4));
        part = part.substr(0, condition);
      }
      dimension.star = part[0] == '*';
      dimension.text = dimension.star ? part.substr(1) : part;
      const bool is_name = std::all_of(dimension.text.begin(), dimension.text.end(),
                                       [](unsigned char c) { return std::isalnum(c) || c == '_'; });
      if (dimension.star || (is_name && std::isupper(static_cast<unsigned char>(dimension.text[0]))))
        dimension.name = slot_of(dimension.text);
      else
        dimension.expression = expression(dimension.text);
      found.dimensions.push_back(std::move(dimension));
    }
    return found;
  }

  Argument argument(std::string line) {
    const size_t colon = line.find(": ");
    const size_t index = argument_of(line.substr(0, colon));
    line = line.substr(colon + 2);
    if (line.ends_with(" strided")) {
      data_.strided[index] = true;
      line = line.substr(0, line.size() - 8);
    }
    const size_t end = line.ends_with(" one") ? line.size() - 4 : line.find(" [");
    std::optional<Shape> size;
    if (end != std::string::npos) size = shape(line.substr(end + 1));
    return {index, dtypes(line.substr(0, end)), std::move(size)};
  }

  OutputRule output(const std::string& line) {
    const size_t colon = line.find(": "), start = line.find(" [", colon), condition = line.find("] if ", start);
    OutputRule found{line.substr(0, colon), dtypes(line.substr(colon + 2, start - colon - 2)), {}, {}, {}};
    if (condition == std::string::npos) {
      found.shape = shape(line.substr(start + 1));
      return found;
    }
    const size_t otherwise = line.find(" else ", condition);
    found.shape = shape(line.substr(start + 1, condition - start));
    found.condition = expression(line.substr(condition + 5, otherwise - condition - 5));
    found.otherwise = shape(line.substr(otherwise + 6));
    return found;
  }

  ContractData& data_;
};

// The check of one call: the statements of the contract are applied to its arguments in order.
class Check {
 public:
  Check(const ContractData& contract, at::ArrayRef<c10::IValue> arguments)
      : contract_(contract), arguments_(arguments) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::IValue& given = arguments[i];
      if (given.isTensor()) {
        values_[i] = Value::of(true);
        if (!first_) first_ = i;
      } else if (given.isDouble()) {
        values_[i] = Value::of(given.toDouble());
      } else if (given.isInt()) {
        values_[i] = Value::of(given.toInt());
      } else if (given.isBool()) {
        values_[i] = Value::of(given.toBool());
      } else if (given.isNone()) {
        values_[i] = Value::make(Value::none, 0);
      } else {
        values_[i] =
            Value::make(Value::list, given.isDoubleList() ? static_cast<int64_t>(given.toDoubleList().size()) : 0);
      }
    }
  }

  void statement(const Argument& argument) {
    const c10::IValue& given = arguments_[argument.index];
    if (given.isNone()) return;
    const std::string& name = contract_.names[argument.index];
    const ScalarType type = *dtype(argument.index);
    TORCH_CHECK(allows(argument.dtypes, type), name, " is ", name_of(type), ", must be ",
                one_of(allowed(argument.dtypes)));
    if (!given.isTensor()) return;
    const Tensor& tensor = given.toTensor();
    TORCH_CHECK(tensor.device() == device(), name, " is on ", tensor.device(), ", must be on ", device(), " like ",
                contract_.names[*first_]);
    if (argument.shape) match(name, tensor.sizes(), *argument.shape);
  }
  void statement(const Requirement& requirement) {
    if (requirement.condition.evaluate(values_).is_true()) return;
    std::string text;
    for (const auto& [before, value] : requirement.message)
      text += before + (value ? to_string(value->evaluate(values_)) : "");
    TORCH_CHECK(false, text);
  }
  void statement(const Let& let) { values_[let.slot] = let.expression.evaluate(values_); }

  void layout() const {
    for (size_t i = 0; i < arguments_.size(); ++i) {
      if (!contract_.written[i]) continue;
      const Tensor& tensor = arguments_[i].toTensor();
      TORCH_CHECK(tensor.is_contiguous(), contract_.names[i], " has strides ", shape_string(tensor.strides()),
                  ", must be contiguous");
    }
  }

  Contract::Output output(const OutputRule& rule) const {
    const bool main = !rule.condition || rule.condition->evaluate(values_).is_true();
    return {allowed(rule.dtypes).front(), sizes(main ? rule.shape : rule.otherwise)};
  }
  at::Device device() const { return arguments_[*first_].toTensor().device(); }

 private:
  using Allowed = c10::SmallVector<ScalarType, 8>;

  std::optional<ScalarType> dtype(size_t argument) const {
    const c10::IValue& given = arguments_[argument];
    if (given.isTensor()) return given.toTensor().scalar_type();
    return given.isInt() ? std::optional(static_cast<ScalarType>(given.toInt())) : std::nullopt;
  }

  Allowed allowed(const Dtypes& dtypes) const {
    Allowed found;
    for (const Dtypes::Part& part : dtypes.parts) {
      const std::optional<ScalarType> of = dtype(part.argument);
      switch (part.kind) {
        case Dtypes::fixed:
          found.push_back(part.type);
          break;
        case Dtypes::any_float:
          found.append(std::begin(kFloats), std::end(kFloats));
          break;
        case Dtypes::like:
          found.push_back(*of);
          break;
        case Dtypes::narrow:
          found.push_back(*of);
          if (of == at::kFloat) found.append({at::kBFloat16, at::kHalf});
          break;
        case Dtypes::wide:
          found.push_back(of == at::kDouble ? at::kDouble : at::kFloat);
          break;
        case Dtypes::scale:
          found.push_back(at::kFloat);
          if (of == at::kDouble) found.push_back(at::kDouble);
          break;
        case Dtypes::or_else:
          found.push_back(of ? *of : *dtype(part.otherwise));
          break;
        case Dtypes::code:
          found.push_back(part.number.evaluate(values_).i > 127 ? at::kByte : at::kChar);
      }
    }
    return found;
  }
  // Whether allowed() contains a dtype.
  bool allows(const Dtypes& dtypes, ScalarType type) const {
    if (dtypes.parts.size() == 1) {  // the common cases, without building a list
      const Dtypes::Part& part = dtypes.parts.front();
      if (part.kind == Dtypes::fixed) return type == part.type;
      if (part.kind == Dtypes::like) return type == *dtype(part.argument);
    }
    const Allowed types = allowed(dtypes);
    return std::find(types.begin(), types.end(), type) != types.end();
  }
  static std::string one_of(const Allowed& types) {
    std::string text = name_of(types.front());
    for (size_t i = 1; i < types.size(); ++i) text += (i + 1 == types.size() ? " or " : ", ") + name_of(types[i]);
    return text;
  }

  bool here(const Dimension& dimension) const {
    return !dimension.only_if || dimension.only_if->evaluate(values_).is_true();
  }

  // Whether `sizes` match a shape. A name without a value takes its size from here; its slot is added to `bound`.
  bool fits(at::IntArrayRef sizes, const Shape& shape, c10::SmallVectorImpl<size_t>& bound) {
    size_t count = 0;
    for (const Dimension& dimension : shape.dimensions) count += here(dimension) && !dimension.star;
    size_t at = 0;
    for (const Dimension& dimension : shape.dimensions) {
      if (!here(dimension)) continue;
      if (dimension.star) {
        if (sizes.size() < count) return false;
        const at::IntArrayRef leading = sizes.slice(0, sizes.size() - count);
        if (bind(*dimension.name, Value::of(leading), bound).sizes() != leading) return false;
        at = leading.size();
        continue;
      }
      if (at == sizes.size()) return false;
      const int64_t size = sizes[at++];
      if (!dimension.name) {
        if (dimension.expression.evaluate(values_).i != size) return false;
        continue;
      }
      if (bind(*dimension.name, Value::of(size), bound).i != size) return false;
    }
    return at == sizes.size();
  }

  const Value& bind(size_t slot, const Value& value, c10::SmallVectorImpl<size_t>& bound) {
    if (!values_[slot].is_known()) {
      values_[slot] = value;
      bound.push_back(slot);
    }
    return values_[slot];
  }

  void match(const std::string& name, at::IntArrayRef given, const Shape& shape) {
    if (shape.one_element) {
      TORCH_CHECK(c10::multiply_integers(given) == 1, name, " has shape ", shape_string(given),
                  ", must have one element");
      return;
    }
    c10::SmallVector<size_t, 4> bound;
    if (fits(given, shape, bound)) return;
    for (const size_t slot : bound) values_[slot] = {};
    TORCH_CHECK(false, name, " has shape ", shape_string(given), ", must be ", text(shape));
  }

  // The shape for a message. A name without a value is printed as the name.
  std::string text(const Shape& shape) const {
    std::vector<std::string> parts;
    for (const Dimension& dimension : shape.dimensions) {
      if (!here(dimension)) continue;
      const Value value = dimension.name ? values_[*dimension.name] : dimension.expression.evaluate(values_);
      if (dimension.star && value.is_known())
        for (const int64_t size : value.sizes()) parts.push_back(std::to_string(size));
      else
        parts.push_back(value.is_known() ? to_string(value) : dimension.star ? "..." : dimension.text);
    }
    std::string found = "(";
    for (size_t i = 0; i < parts.size(); ++i) found += (i ? ", " : "") + parts[i];
    return found + (parts.size() == 1 ? ",)" : ")");
  }

  c10::SmallVector<int64_t, 5> sizes(const Shape& shape) const {
    c10::SmallVector<int64_t, 5> found;
    for (const Dimension& dimension : shape.dimensions) {
      if (!here(dimension)) continue;
      const Value value = dimension.name ? values_[*dimension.name] : dimension.expression.evaluate(values_);
      if (dimension.star)
        found.append(value.sizes().begin(), value.sizes().end());
      else
        found.push_back(value.i);
    }
    return found;
  }

  const ContractData& contract_;
  const at::ArrayRef<c10::IValue> arguments_;
  Values values_;
  std::optional<size_t> first_;  // index of the first argument that is a tensor
};

}  // namespace

Contract::Contract(const c10::FunctionSchema& schema, const std::string& text)
    : data_(std::make_unique<ContractData>()) {
  for (const c10::Argument& argument : schema.arguments()) {
    data_->slots.emplace(argument.name(), data_->names.size());
    data_->names.push_back(argument.name());
    data_->written.push_back(argument.alias_info() && argument.alias_info()->isWrite());
    data_->strided.push_back(false);
  }
  Reader reader(*data_);
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) reader.read(line);
  if (data_->slots.size() > Values().size()) throw std::invalid_argument("a contract has too many names: " + text);
}
Contract::~Contract() = default;

Contract::Outputs Contract::check(at::ArrayRef<c10::IValue> arguments) const {
  Check check(*data_, arguments);
  for (const auto& statement : data_->statements)
    std::visit([&](const auto& rule) { check.statement(rule); }, statement);
  check.layout();
  Outputs found;
  for (const OutputRule& rule : data_->outputs) found.push_back(check.output(rule));
  return found;
}

void Contract::check_output(size_t index, const Tensor& given, const Output& wanted, at::Device device) const {
  const std::string& name = data_->outputs[index].name;
  TORCH_CHECK_VALUE(
      given.sizes() == at::IntArrayRef(wanted.sizes) && given.scalar_type() == wanted.type && given.device() == device,
      name, " is ", name_of(given.scalar_type()), " of shape ", shape_string(given.sizes()), " on ", given.device(),
      ", must be ", name_of(wanted.type), " of shape ", shape_string(wanted.sizes), " on ", device);
  TORCH_CHECK_VALUE(given.is_contiguous(), name, " has strides ", shape_string(given.strides()),
                    ", must be contiguous");
}

size_t Contract::arguments() const { return data_->names.size(); }
size_t Contract::outputs() const { return data_->outputs.size(); }
const std::string& Contract::output_name(size_t index) const { return data_->outputs[index].name; }
bool Contract::strided(size_t argument) const { return data_->strided[argument]; }

}  // namespace qk
