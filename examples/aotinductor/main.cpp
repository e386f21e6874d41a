// Runs the model that export.py has packaged, in a process without Python: whole, and in two parts with the state
// passed on. Both must give the example's logits and final state.
//
// run librwkv_kernels.so model.pt2 example.pt
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Tensors = std::vector<at::Tensor>;

// The library registers its operators with torch while it is loaded, and is never unloaded.
void load_operators(const char* path) {
  if (dlopen(path, RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
}

// A file of torch.save: lists of tensors, by name.
c10::impl::GenericDict read_example(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes).toGenericDict();
}

Tensors tensors_of(const c10::impl::GenericDict& example, const char* name) {
  Tensors tensors;
  for (const c10::IValue& item : example.at(name).toListRef()) tensors.push_back(item.toTensor());
  return tensors;
}

// The parts of a state that do not depend on its max: [layers, B, 3, C] -> num / den and max + log(den).
at::Tensor without_gauge(const at::Tensor& state) {
  const at::Tensor den = state.select(2, 1);
  return at::stack({state.select(2, 0) / den, state.select(2, 2) + den.log()}, 2);
}

void require_close(const std::string& what, Tensors found, Tensors expected) {
  if (found.size() != expected.size()) throw std::runtime_error(what + ": another number of outputs");
  for (Tensors* outputs : {&found, &expected}) outputs->back() = without_gauge(outputs->back());
  double largest = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    if (!at::allclose(found[i], expected[i], 1e-4, 1e-5)) {
      throw std::runtime_error(what + ": output " + std::to_string(i) + " differs");
    }
    largest = std::max(largest, (found[i] - expected[i]).abs().max().item<double>());
  }
  std::cout << what << ": " << found.size() << " outputs, within " << largest << "\n";
}

void run(const char* library, const char* package, const char* example) {
  load_operators(library);
  torch::inductor::AOTIModelPackageLoader model(package);
  const auto saved = read_example(example);
  // Tokens [1, T] and the state's three tensors -> logits [1, T, V] and the state's three tensors.
  const Tensors inputs = tensors_of(saved, "inputs"), expected = tensors_of(saved, "outputs");
  require_close("whole", model.run(inputs), expected);

  const int64_t T = inputs[0].size(1), middle = T / 3;
  const Tensors first = model.run({inputs[0].narrow(1, 0, middle).contiguous(), inputs[1], inputs[2], inputs[3]});
  Tensors second = model.run({inputs[0].narrow(1, middle, T - middle).contiguous(), first[1], first[2], first[3]});
  second[0] = at::cat({first[0], second[0]}, 1);
  require_close("in two parts", second, expected);

  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized") != nullptr) throw std::runtime_error("Python is in this process");
  std::cout << "no Python in this process\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "run librwkv_kernels.so model.pt2 example.pt\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
