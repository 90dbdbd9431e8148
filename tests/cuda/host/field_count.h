// The number of fields of a plain structure, so that tests notice a field that they do not know.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

struct AnyValue {
  template <class T>
  operator T() const;
};

template <class S, size_t... I>
constexpr auto takes(std::index_sequence<I...>) -> decltype(S{(void(I), AnyValue{})...}, true) {
  return true;
}
template <class S>
constexpr bool takes(...) {
  return false;
}

// The largest number of values that S can be initialized from.
template <class S, size_t N = 64>
constexpr size_t field_count() {
  if constexpr (N == 0 || takes<S>(std::make_index_sequence<N>()))
    return N;
  else
    return field_count<S, N - 1>();
}
