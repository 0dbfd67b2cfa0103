"""The tests that each family of networks inherits explain their assertions as those of a test module do."""

import pytest

pytest.register_assert_rewrite("checks")
