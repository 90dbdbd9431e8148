// The expressions of contracts: a small part of Python's, of truth values, integers, floating point numbers, None and
// shapes. qatkernels/ops/_expression.py says what the part is and refuses everything else when a contract is declared;
// here it is only evaluated. Arithmetic is that of integers.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <functional>
#include <string>
#include <vector>

namespace qk {

// The value of a name. A tensor is the truth value true; of a list there is only the length.
struct Value {
  enum Kind { unknown, none, truth, integer, real, shape, list };

  Kind kind = unknown;
  union {
    int64_t i = 0;  // truth, integer; the length of a shape and of a list
    double d;       // real
  };
  const int64_t* first = nullptr;  // shape

  static Value of(int64_t i) { return make(integer, i); }
  static Value of(bool b) { return make(truth, b); }
  static Value of(double d) {
    Value value = make(real, 0);
    value.d = d;
    return value;
  }
  static Value of(at::IntArrayRef sizes) {
    Value value = make(shape, static_cast<int64_t>(sizes.size()));
    value.first = sizes.data();
    return value;
  }
  static Value make(Kind kind, int64_t i) {
    Value value;
    value.kind = kind;
    value.i = i;
    return value;
  }
  bool is_known() const { return kind != unknown; }
  bool is_true() const { return kind == real ? d != 0 : kind > none && i != 0; }
  double number() const { return kind == real ? d : static_cast<double>(i); }
  at::IntArrayRef sizes() const { return {first, static_cast<size_t>(i)}; }
};

// As Python prints it.
std::string to_string(const Value& value);

// Values by slot: the arguments of an op first, then the names of a contract.
using Values = std::array<Value, 32>;
// The slot of a name.
using SlotOf = std::function<size_t(const std::string&)>;

class Expression {
 public:
  // Throws std::invalid_argument if the text is no expression.
  static Expression parse(const std::string& text, const SlotOf& slot_of);

  // Unknown if it depends on a name that has no value yet.
  Value evaluate(const Values& values) const;

 private:
  friend class Parser;
  // clang-format off
  enum class Op {
    constant, name, choice, disjunction, conjunction, negation, less, less_equal, equal, not_equal, is, is_not,
    add, subtract, multiply, modulo, power, negative, numel, len, min, row_bytes
  };
  // clang-format on

  Op op_ = Op::constant;
  Value value_;      // of a constant
  size_t slot_ = 0;  // of a name
  std::vector<Expression> operands_;
};

}  // namespace qk
