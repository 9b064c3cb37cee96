// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/text_escapes.hpp"

#include <gtest/gtest.h>

#include <string>

#include "tests/support/property.hpp"

namespace {

using gemma4::unescape;

TEST(TextEscapes, NamedBytesAreReplaced) {
  EXPECT_EQ(unescape(R"(a\nb\r\t\'\"\\c)"), "a\nb\r\t'\"\\c");
  EXPECT_EQ(unescape(R"(\x41\x7a\xE2\x96\x81\x00.)"), std::string("Az\xE2\x96\x81\0.", 7));
  EXPECT_EQ(unescape(R"(\\n)"), "\\n");
}

TEST(TextEscapes, EveryOtherBackslashStays) {
  for (const char* text : {"\\", "a\\", "\\q", "\\x", "\\x4", "\\xg1", "\\x1g", "\\0", ""}) {
    EXPECT_EQ(unescape(text), text);
  }
}

RC_GTEST_PROP(TextEscapes, UndoesDoubledBackslashes, (const std::string& text)) {
  std::string escaped;
  for (const char c : text) escaped += c == '\\' ? "\\\\" : std::string(1, c);
  RC_ASSERT(unescape(escaped) == text);
}

}  // namespace
