// What the files of the Python module share; pybind11 stays in these files.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "wkv_problem.h"

namespace wkv {

DType parse_dtype(const std::string& name);

// Of the CUDA build, or of a build without.
pybind11::object cuda_version();
pybind11::tuple cuda_architectures();

// The plans and launches of the CUDA kernels, which need neither GPU nor toolkit.
void define_cuda(pybind11::module_& m);

}  // namespace wkv
