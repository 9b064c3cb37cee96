// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/id_list.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/property.hpp"

namespace {

using namespace gemma4;
using Ids = std::vector<std::int32_t>;

TEST(IdList, IsWrittenAsOneLine) {
  EXPECT_EQ(format_ids(Ids{2, 304, 0}), "[2, 304, 0]");
  EXPECT_EQ(format_ids(Ids{}), "[]");
}

RC_GTEST_PROP(IdList, IsReadBack, ()) {
  const auto ids = *rc::gen::container<Ids>(rc::gen::nonNegative<std::int32_t>());
  RC_ASSERT(parse_ids(format_ids(ids)) == ids);
}

TEST(IdList, BlanksMayStandBetween) {
  EXPECT_EQ(parse_ids(" [ 1 ,\n 2\t,2147483647 ]\n"), (Ids{1, 2, 2147483647}));
  EXPECT_EQ(parse_ids("[\n]"), Ids{});
}

TEST(IdList, AnythingElseIsRefusedWithItsPlace) {
  const auto refusal = [](std::string_view text) -> std::string {
    try {
      static_cast<void>(parse_ids(text));
    } catch (const FormatError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal("1, 2"), "id list: expected '[' at byte 0, found '1'");
  EXPECT_EQ(refusal("[1, x]"), "id list: expected an id from 0 to 2147483647 at byte 4, found 'x'");
  EXPECT_EQ(refusal("[1, 2147483648]"), "id list: expected an id from 0 to 2147483647 at byte 4, found '2'");
  EXPECT_EQ(refusal("[1 2]"), "id list: expected ',' or ']' at byte 3, found '2'");
  EXPECT_EQ(refusal("[1] 2"), "id list: expected nothing after ']' at byte 4, found '2'");
  for (const char* text : {"", "[", "[1", "[1,", "[1,]", "[,1]", "[-1]", "[1.5]", "[]]", "[[1]]"}) {
    EXPECT_NE(refusal(text), "accepted") << text;
  }
  EXPECT_NE(refusal(std::string_view("[1]\0", 4)), "accepted");
}

}  // namespace
