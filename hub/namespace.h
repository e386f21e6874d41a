// For kernel-builder, whose macro names the namespace that it generates; csrc/common/namespace.h follows in the same file.
#define WKV_NAMESPACE TORCH_EXTENSION_NAME
#define WKV_COMPILER "kernel-builder"
#define WKV_CUDA_ARCHITECTURES "7.5,8.0,8.6,8.9,9.0,10.0,12.0"
