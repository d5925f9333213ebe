"""The law of company, on several ranks: gloo processes train like one, stop together and fail together."""

import ranks


def test_two_ranks_stop_and_fail_together_and_train_under_ddp_like_one():
    ranks.on_each_rank(ranks.work)


def test_two_ranks_that_need_different_counts_train_under_ddp_like_one():
    ranks.on_each_rank(ranks.work_ddp)


def test_two_ranks_that_need_different_counts_train_under_fsdp2_like_one():
    ranks.on_each_rank(ranks.work_fsdp)
