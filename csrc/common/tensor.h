// All of torch that the operators use, in its stable interface alone: tensors, allocation, copies. The interface is C
// functions behind thin C++ classes; a library that uses nothing else loads in every torch from 2.11 on, independent of
// the version and the compiler of either.
//
// Small calls pay for every function here, so sizes and types are compared as the integers that the C functions give,
// and a pointer with strides serves in place of a view.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "params.h"

namespace wkv {

using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

// Unless the condition holds, throws the parts as one message. Python gets a RuntimeError from every torch version;
// the public functions, which check before, own ValueError and TypeError.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// ---- types and devices, as torch's C functions number them ----

inline int32_t torch_type(DType dtype) {
  static const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float64()};
  return types[static_cast<int>(dtype)];
}

inline int32_t torch_type_of(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

inline DType dtype_of(const char* name, const Tensor& tensor) {
  const int32_t type = torch_type_of(tensor);
  for (const DType dtype : kDTypes) {
    if (type == torch_type(dtype)) return dtype;
  }
  require(false, name, ": expected float32, float16, bfloat16 or float64, got ", tensor.scalar_type());
  return DType::float32;
}

inline std::ostream& operator<<(std::ostream& stream, DType dtype) { return stream << name_of(dtype); }

struct Device {
  int32_t type, index;

  explicit Device(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  }
  bool operator==(const Device&) const = default;

  // A contiguous, uninitialised tensor.
  Tensor empty(const Shape& shape, DType dtype) const {
    constexpr size_t kMostDimensions = 4;
    require(shape.size() <= kMostDimensions, "a tensor of ", shape.size(), " dimensions");
    int64_t strides[kMostDimensions], stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= shape.begin()[i] > 0 ? shape.begin()[i] : 1;
    }
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                                                    torch_type(dtype), type, index, &handle));
    return Tensor(handle);
  }
};

inline std::ostream& operator<<(std::ostream& stream, const Device& device) {
  if (device.type == aoti_torch_device_type_cpu()) return stream << "cpu";
  if (device.type == aoti_torch_device_type_cuda()) return stream << "cuda:" << device.index;
  return stream << "device type " << device.type << ", index " << device.index;
}

// ---- shapes ----

struct Sizes {
  const int64_t* data;
  int64_t count;

  bool operator==(const Sizes& other) const {
    if (count != other.count) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (data[i] != other.data[i]) return false;
    }
    return true;
  }
};

inline Sizes sizes_of(const Tensor& tensor) {
  int64_t* sizes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  return {sizes, tensor.dim()};
}

// Valid as long as the list.
inline Sizes sizes_of(const Shape& shape) { return {shape.begin(), static_cast<int64_t>(shape.size())}; }

inline std::ostream& operator<<(std::ostream& stream, const Sizes& sizes) {
  stream << "[";
  for (int64_t i = 0; i < sizes.count; ++i) stream << (i > 0 ? ", " : "") << sizes.data[i];
  return stream << "]";
}

// ---- copies ----

inline void set_zero(const Tensor& tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get())); }

inline void copy(const Tensor& source, const Tensor& target) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(target.get(), source.get(), /*non_blocking=*/0));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Channels are the last dimension.
inline void make_channels_contiguous(Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.stride(last) != 1 && tensor.size(last) > 1) tensor = torch::stable::contiguous(tensor);
}

inline const void* data_of(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace wkv
