#include "common/philox.h"

#include "tests/check.h"

// The known-answer vectors for philox4x32-10 that its authors publish with Random123.

namespace {

void check_answer(fdfa::Philox4 counter, uint32_t key0, uint32_t key1, fdfa::Philox4 expected) {
  const fdfa::Philox4 r = fdfa::philox4x32_10(counter, key0, key1);
  CHECK(r.x0 == expected.x0 && r.x1 == expected.x1 && r.x2 == expected.x2 && r.x3 == expected.x3);
}

}  // namespace

int main() {
  constexpr uint32_t kOnes = 0xFFFFFFFF;
  check_answer({0, 0, 0, 0}, 0, 0, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8});
  check_answer({kOnes, kOnes, kOnes, kOnes}, kOnes, kOnes,
               {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD});
  // Digits of pi.
  check_answer({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, 0xA4093822, 0x299F31D0,
               {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1});
  return fdfa::test::failures();
}
