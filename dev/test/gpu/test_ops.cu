/*
The ops of llmc/ on the GPU against their CPU references: one op, test_<op>.cuh, is one object of this file.

    nvcc … -DOP=rope -c test_ops.cu -o rope.o       adds test_rope to the list of tests
    nvcc … test_ops.cu rope.o swiglu.o …            a program that runs those: test_ops [--reduced] [NAME …]

test_llama3cu is linked with all of these objects.
*/
#include "gpu_test.cuh"

#ifdef OP
#define TEXT_(...) #__VA_ARGS__
#define TEXT(...) TEXT_(__VA_ARGS__)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#include TEXT(JOIN(test_, OP).cuh)
GPU_TEST(OP);
#else
int main(int argc, char** argv) { return gpu_test_main(argc, argv); }
#endif
