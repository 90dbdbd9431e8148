#include "expression.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>

#include "text.h"

namespace qk {

std::string to_string(const Value& value) {
  switch (value.kind) {
    case Value::truth:
      return value.i ? "True" : "False";
    case Value::none:
      return "None";
    case Value::shape:
      return shape_string(value.sizes());
    case Value::real: {
      if (!std::isfinite(value.d)) return std::isnan(value.d) ? "nan" : value.d > 0 ? "inf" : "-inf";
      const double size = std::abs(value.d);
      const bool fixed = size == 0 || (size >= 1e-4 && size < 1e16);
      char text[400];
      const auto end = std::to_chars(text, text + sizeof text, value.d,
                                     fixed ? std::chars_format::fixed : std::chars_format::scientific)
                           .ptr;
      std::string found(text, end);
      return fixed && found.find('.') == std::string::npos ? found + ".0" : found;
    }
    default:
      return std::to_string(value.i);
  }
}

// By recursive descent, from the operator that binds least to the one that binds most.
class Parser {
 public:
  Parser(const std::string& text, const SlotOf& slot_of) : text_(text), slot_of_(slot_of) { next(); }

  Expression whole() {
    Expression found = choice();
    if (!token_.empty()) fail();
    return found;
  }

 private:
  using Op = Expression::Op;

  Expression choice() {
    Expression first = disjunction();
    if (!take("if")) return first;
    Expression condition = disjunction();
    if (!take("else")) fail();
    return make(Op::choice, {condition, first, choice()});
  }
  Expression disjunction() {
    Expression left = conjunction();
    while (take("or")) left = make(Op::disjunction, {left, conjunction()});
    return left;
  }
  Expression conjunction() {
    Expression left = negation();
    while (take("and")) left = make(Op::conjunction, {left, negation()});
    return left;
  }
  Expression negation() { return take("not") ? make(Op::negation, {negation()}) : comparison(); }
  Expression comparison() {
    Expression left = sum(), all;
    bool any = false;
    for (;;) {
      Op op;
      bool swapped = false;
      if (take("<=")) {
        op = Op::less_equal;
      } else if (take("<")) {
        op = Op::less;
      } else if (take(">=")) {
        op = Op::less_equal, swapped = true;
      } else if (take(">")) {
        op = Op::less, swapped = true;
      } else if (take("==")) {
        op = Op::equal;
      } else if (take("!=")) {
        op = Op::not_equal;
      } else if (take("is")) {
        op = take("not") ? Op::is_not : Op::is;
      } else {
        return any ? all : left;
      }
      Expression right = sum();
      Expression one = swapped ? make(op, {right, left}) : make(op, {left, right});
      all = any ? make(Op::conjunction, {all, one}) : one;
      any = true;
      left = right;
    }
  }
  Expression sum() {
    Expression left = term();
    for (;;) {
      if (take("+"))
        left = make(Op::add, {left, term()});
      else if (take("-"))
        left = make(Op::subtract, {left, term()});
      else
        return left;
    }
  }
  Expression term() {
    Expression left = factor();
    for (;;) {
      if (take("*"))
        left = make(Op::multiply, {left, factor()});
      else if (take("%"))
        left = make(Op::modulo, {left, factor()});
      else
        return left;
    }
  }
  Expression factor() {
    if (take("-")) return make(Op::negative, {factor()});
    Expression base = atom();
    return take("**") ? make(Op::power, {base, factor()}) : base;
  }
  Expression atom() {
    if (take("(")) {
      Expression inner = choice();
      if (!take(")")) fail();
      return inner;
    }
    if (take("None")) return constant(Value::make(Value::none, 0));
    if (take("inf")) return constant(Value::of(std::numeric_limits<double>::infinity()));
    const std::string token = token_;
    if (token.empty()) fail();
    if (std::isdigit(static_cast<unsigned char>(token[0]))) {
      next();
      if (token.find('.') == std::string::npos) return constant(Value::of(static_cast<int64_t>(std::stoll(token))));
      return constant(Value::of(std::stod(token)));
    }
    if (!std::isalpha(static_cast<unsigned char>(token[0]))) fail();
    next();
    static const std::map<std::string, std::pair<Op, size_t>> functions{
        {"numel", {Op::numel, 1}}, {"len", {Op::len, 1}}, {"min", {Op::min, 2}}, {"row_bytes", {Op::row_bytes, 2}}};
    if (take("(")) {
      const auto function = functions.find(token);
      if (function == functions.end()) fail();
      std::vector<Expression> operands{choice()};
      while (take(",")) operands.push_back(choice());
      if (!take(")") || operands.size() != function->second.second) fail();
      return make(function->second.first, std::move(operands));
    }
    Expression found;
    found.op_ = Op::name;
    found.slot_ = slot_of_(token);
    return found;
  }

  static Expression make(Op op, std::vector<Expression> operands) {
    Expression made;
    made.op_ = op;
    made.operands_ = std::move(operands);
    return made;
  }
  static Expression constant(Value value) {
    Expression made;
    made.value_ = value;
    return made;
  }

  bool take(const char* token) {
    if (token_ != token) return false;
    next();
    return true;
  }
  void next() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    const size_t start = at_;
    const auto is_word = [&] {
      return at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '_' ||
                                    (text_[at_] == '.' && std::isdigit(static_cast<unsigned char>(text_[start]))));
    };
    if (is_word()) {
      while (is_word()) ++at_;
    } else if (at_ < text_.size()) {
      const std::string two = text_.substr(at_, 2);
      at_ += two == "<=" || two == ">=" || two == "==" || two == "!=" || two == "**" ? 2 : 1;
    }
    token_ = text_.substr(start, at_ - start);
  }
  [[noreturn]] void fail() const { throw std::invalid_argument("not an expression of a contract: " + text_); }

  const std::string text_;
  const SlotOf& slot_of_;
  size_t at_ = 0;
  std::string token_;
};

Expression Expression::parse(const std::string& text, const SlotOf& slot_of) { return Parser(text, slot_of).whole(); }

namespace {

// A result that overflows becomes the largest integer, which no dimension has.
template <class F>
int64_t saturated(int64_t a, int64_t b, F overflows) {
  int64_t result;
  return overflows(a, b, &result) ? std::numeric_limits<int64_t>::max() : result;
}
int64_t sum(int64_t a, int64_t b) {
  return saturated(a, b, [](auto... n) { return __builtin_add_overflow(n...); });
}
int64_t product(int64_t a, int64_t b) {
  return saturated(a, b, [](auto... n) { return __builtin_mul_overflow(n...); });
}

bool equal(const Value& a, const Value& b) {
  if (a.kind == Value::none || b.kind == Value::none) return a.kind == b.kind;
  return a.kind == Value::real || b.kind == Value::real ? a.number() == b.number() : a.i == b.i;
}

}  // namespace

Value Expression::evaluate(const Values& values) const {
  const auto operand = [&](size_t index) { return operands_[index].evaluate(values); };
  switch (op_) {
    case Op::constant:
      return value_;
    case Op::name:
      return values[slot_];
    case Op::conjunction:
    case Op::disjunction: {
      const Value left = operand(0);
      return !left.is_known() || left.is_true() == (op_ == Op::disjunction) ? left : operand(1);
    }
    case Op::choice: {
      const Value condition = operand(0);
      return condition.is_known() ? operand(condition.is_true() ? 1 : 2) : condition;
    }
    default:
      break;
  }
  const Value a = operand(0), b = operands_.size() > 1 ? operand(1) : a;
  if (!a.is_known() || !b.is_known()) return {};
  const bool real = a.kind == Value::real || b.kind == Value::real;
  switch (op_) {
    case Op::negation:
      return Value::of(!a.is_true());
    case Op::negative:
      return real ? Value::of(-a.d) : Value::of(-a.i);
    case Op::is:
      return Value::of((a.kind == Value::none) == (b.kind == Value::none));
    case Op::is_not:
      return Value::of((a.kind == Value::none) != (b.kind == Value::none));
    case Op::numel:
      return Value::of(std::accumulate(a.sizes().begin(), a.sizes().end(), int64_t{1}, product));
    case Op::len:
      return Value::of(a.i);
    case Op::row_bytes:  // (cols * bits + 7) / 8, in parts that overflow only if the result does
      return Value::of(sum(product(a.i / 8, b.i), product(a.i % 8, b.i) / 8 + (a.i % 8 * (b.i % 8) % 8 != 0)));
    case Op::less:
      return Value::of(real ? a.number() < b.number() : a.i < b.i);
    case Op::less_equal:
      return Value::of(real ? a.number() <= b.number() : a.i <= b.i);
    case Op::equal:
      return Value::of(equal(a, b));
    case Op::not_equal:
      return Value::of(!equal(a, b));
    case Op::min:
      return (real ? a.number() <= b.number() : a.i <= b.i) ? a : b;
    case Op::add:
      return Value::of(sum(a.i, b.i));
    case Op::subtract:
      return Value::of(saturated(a.i, b.i, [](auto... n) { return __builtin_sub_overflow(n...); }));
    case Op::multiply:
      return Value::of(product(a.i, b.i));
    case Op::modulo:
      return Value::of(b.i ? (a.i % b.i + b.i) % b.i : 0);  // as Python's: of the sign of b
    case Op::power: {
      int64_t power = 1;
      for (int64_t n = 0; n < std::min<int64_t>(b.i, 64); ++n) power = product(power, a.i);
      return Value::of(power);
    }
    default:
      return {};
  }
}

}  // namespace qk
