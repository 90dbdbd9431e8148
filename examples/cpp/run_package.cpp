// Runs a model that torch._inductor.aoti_compile_and_package compiled, without Python.
//
//     run_package MODEL.pt2 ROWS COLUMNS < input > output
//
// The input is ROWS x COLUMNS float32 numbers, the output those of the model's first output. The program is linked with
// libtorch and with qatkernels_ops, which has the ops that the model calls.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: run_package MODEL.pt2 ROWS COLUMNS < input > output\n");
    return 2;
  }
  torch::Tensor input = torch::empty({std::atol(arguments[2]), std::atol(arguments[3])});
  const size_t wanted = input.numel();
  if (std::fread(input.data_ptr<float>(), sizeof(float), wanted, stdin) != wanted) {
    std::fprintf(stderr, "the input has fewer than %zu numbers\n", wanted);
    return 1;
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const torch::Tensor output = model.run({input}).at(0).contiguous();
  std::fwrite(output.data_ptr<float>(), sizeof(float), output.numel(), stdout);
  return 0;
}
