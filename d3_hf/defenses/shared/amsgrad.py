"""Adam with the AMSGrad maximum, which SAU and i-BAU use and the Trainer has no option for."""

import torch

from ...training.trainer import PurifyTrainer


class AMSGradTrainer(PurifyTrainer):
    """A `PurifyTrainer` whose AdamW, where ``optim`` asks for it, keeps the AMSGrad maximum."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """AdamW gets ``amsgrad``; other optimizers are as they are."""
        kind, options = PurifyTrainer.get_optimizer_cls_and_kwargs(args, model)
        return kind, options | {"amsgrad": True} if kind is torch.optim.AdamW else options
