// The namespace of the operators in torch.ops. A copy of the package under another name is built with another one, so
// that both can be loaded by one process.
#pragma once

#if !defined(WKV_NAMESPACE)
#define WKV_NAMESPACE rwkv_kernels
#endif

// Torch's macros paste the name, which must have been expanded before.
#define WKV_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define WKV_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

#define WKV_QUOTED(name) #name
#define WKV_STRING(name) WKV_QUOTED(name)

// A function that is found by its name in the library.
#define WKV_EXPORTED extern "C" __attribute__((visibility("default")))
