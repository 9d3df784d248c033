// What the shared_ptr of libstdc++ asks, in order to count without atomics where there is one thread.
// glibc answers from 2.32 on, and wheels must load on 2.28: this is the answer within this module.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
