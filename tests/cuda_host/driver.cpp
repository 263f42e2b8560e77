// Runs functions of the CUDA kernels on the host for a Python program: calls come in on the standard input, and what
// they wrote goes out on the standard output. tests/cuda_host/__init__.py is the other side.
//
//   call:    name, number of arguments, arguments
//   answer:  0, then per output: position, bytes; then -1 and how many grids have been run; or 1 and a message
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/functions.h"
#include "cuda_host.h"

namespace contrastive_ops {
namespace {

// ---- Messages
// --------------------------------------------------------------------------------------------------------

void read(void* to, size_t bytes) {
  if (bytes > 0 && fread(to, 1, bytes, stdin) != bytes) exit(0);  // the other side is gone
}
template <class T>
T read() {
  T value;
  read(&value, sizeof(T));
  return value;
}
void write(const void* from, size_t bytes) { fwrite(from, 1, bytes, stdout); }
template <class T>
void write(T value) {
  write(&value, sizeof(T));
}

// A tensor in memory of its exact size, so that AddressSanitizer sees what reaches beyond.
struct Memory {
  Array array;
  size_t bytes = 0;
  std::unique_ptr<unsigned char[]> memory;

  void read_body() {
    array.type = static_cast<Type>(read<uint8_t>());
    array.dims = read<uint8_t>();
    for (int d = 0; d < array.dims; ++d) array.sizes[d] = read<int64_t>();
    bytes = read<uint64_t>();
    memory.reset(new unsigned char[bytes]);
    contrastive_ops::read(memory.get(), bytes);
    array.data = memory.get();
  }
};

// An argument as it came, whatever the function wants.
struct Value {
  char tag = 's';  // the stream
  int64_t integer = 0;
  double number = 0;
  Memory memory;
  std::vector<Memory> memories;
  std::vector<int64_t> integers;
  std::vector<double> numbers;

  void read_body() {
    using contrastive_ops::read;
    tag = read<char>();
    if (tag == 'i') integer = read<int64_t>();
    if (tag == 'd') number = read<double>();
    if (tag == 'a') memory.read_body();
    if (tag == 't') {
      memories.resize(read<uint32_t>());
      for (Memory& memory : memories) memory.read_body();
    }
    if (tag == 'l') {
      integers.resize(read<uint32_t>());
      read(integers.data(), integers.size() * sizeof(int64_t));
    }
    if (tag == 'f') {
      numbers.resize(read<uint32_t>());
      read(numbers.data(), numbers.size() * sizeof(double));
    }
  }
};

// ---- Arguments of functions
// ------------------------------------------------------------------------------------------

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

template <class T>
constexpr Type kTypeOf = std::is_same_v<T, float>     ? Type::float32
                         : std::is_same_v<T, double>  ? Type::float64
                         : std::is_same_v<T, int64_t> ? Type::int64
                         : std::is_same_v<T, int32_t> ? Type::int32
                         : std::is_same_v<T, bool>    ? Type::boolean
                                                      : Type::other;

template <class P>
struct Argument;
template <>
struct Argument<int64_t> {
  static constexpr bool kOutput = false;
  int64_t get(Value& v) {
    if (v.tag != 'i') refuse("an integer is wanted");
    return v.integer;
  }
};
template <>
struct Argument<double> {
  static constexpr bool kOutput = false;
  double get(Value& v) {
    if (v.tag != 'd' && v.tag != 'i') refuse("a number is wanted");
    return v.tag == 'd' ? v.number : static_cast<double>(v.integer);
  }
};
template <>
struct Argument<bool> {
  static constexpr bool kOutput = false;
  bool get(Value& v) { return Argument<int64_t>().get(v) != 0; }
};
template <class T>
struct Argument<T*> {
  static constexpr bool kOutput = !std::is_const_v<T>;
  T* get(Value& v) {
    if (v.tag == 'n') return nullptr;
    const Array& array = v.memory.array;
    if (v.tag != 'a' || array.type != kTypeOf<std::remove_const_t<T>>) refuse("a tensor of another dtype is wanted");
    return array.as<T>();
  }
};
template <class Tensor, bool output>
struct FloatingArgument {
  static constexpr bool kOutput = output;
  Tensor get(Value& v) {
    if (v.tag == 'n') return {nullptr, DType::float32};
    const Array& array = v.memory.array;
    if (v.tag != 'a' || !is_floating(array.type) || array.type == Type::float64) refuse("floats are wanted");
    return {array.data, dtype_of(array)};
  }
};
template <>
struct Argument<Input> : FloatingArgument<Input, false> {};
template <>
struct Argument<Output> : FloatingArgument<Output, true> {};
template <>
struct Argument<Arrays> {
  static constexpr bool kOutput = false;
  std::vector<Array> arrays;
  Arrays get(Value& v) {
    if (v.tag != 't') refuse("a list of tensors is wanted");
    for (const Memory& memory : v.memories) arrays.push_back(memory.array);
    return {arrays.data(), static_cast<int64_t>(arrays.size())};
  }
};
template <>
struct Argument<Integers> {
  static constexpr bool kOutput = false;
  Integers get(Value& v) {
    if (v.tag != 'l') refuse("a list of integers is wanted");
    return {v.integers.data(), static_cast<int64_t>(v.integers.size())};
  }
};
template <>
struct Argument<Doubles> {
  static constexpr bool kOutput = false;
  Doubles get(Value& v) {
    if (v.tag != 'f' && (v.tag != 'l' || !v.integers.empty())) refuse("a list of numbers is wanted");
    return {v.numbers.data(), static_cast<int64_t>(v.numbers.size())};
  }
};
template <>
struct Argument<Stream> {
  static constexpr bool kOutput = false;
  Stream get(Value&) { return nullptr; }
};

// ---- Calls
// -----------------------------------------------------------------------------------------------------------

using Call = std::function<void(std::vector<Value>&)>;

template <class... P, size_t... index>
Call call_of(void (*function)(P...), std::index_sequence<index...>) {
  return [function](std::vector<Value>& values) {
    if (values.size() != sizeof...(P)) refuse("another number of arguments is wanted");
    std::tuple<Argument<P>...> arguments;
    function(std::get<index>(arguments).get(values[index])...);
    write<int32_t>(0);
    const bool output[] = {Argument<P>::kOutput...};
    for (size_t k = 0; k < sizeof...(P); ++k) {
      if (!output[k] || values[k].tag != 'a') continue;
      write<int32_t>(static_cast<int32_t>(k));
      write(values[k].memory.array.data, values[k].memory.bytes);
    }
    write<int32_t>(-1);
    write<int64_t>(cuda_host::launches());
  };
}
template <class... P>
Call call_of(void (*function)(P...)) {
  return call_of(function, std::index_sequence_for<P...>());
}

const std::map<std::string, Call>& calls() {
  static const std::map<std::string, Call> table = {
#define CONTRASTIVE_OPS_CALL(name) {#name, call_of(&name)},
      CONTRASTIVE_OPS_CUDA_FUNCTIONS(CONTRASTIVE_OPS_CALL)
#undef CONTRASTIVE_OPS_CALL
  };
  return table;
}

void answer_one() {
  std::string name(read<uint32_t>(), '\0');
  read(name.data(), name.size());
  std::vector<Value> values(read<uint32_t>() + 1);
  for (size_t k = 1; k < values.size(); ++k) values[k].read_body();  // the stream, which is the first, is not sent
  try {
    const auto found = calls().find(name);
    if (found == calls().end()) refuse("no such function");
    found->second(values);
  } catch (const std::exception& error) {
    const std::string message = name + ": " + error.what();
    write<int32_t>(1);
    write<uint32_t>(static_cast<uint32_t>(message.size()));
    write(message.data(), message.size());
  }
  fflush(stdout);
}

}  // namespace
}  // namespace contrastive_ops

// Arguments: ascending, descending or shuffled, and the seed of the shuffles.
int main(int count, char** words) {
  using cuda_host::Schedule;
  const std::string name = count > 1 ? words[1] : "ascending";
  const Schedule schedule = name == "shuffled"     ? Schedule::shuffled
                            : name == "descending" ? Schedule::descending
                                                   : Schedule::ascending;
  cuda_host::set_schedule(schedule, count > 2 ? static_cast<unsigned>(atoi(words[2])) : 0);
  for (;;) contrastive_ops::answer_one();
}
