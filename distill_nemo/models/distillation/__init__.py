"""The distillation model of a student and a teacher."""

from distill_nemo.models.distillation.convert import adjust_distillation_model_for_mcore

__all__ = ["adjust_distillation_model_for_mcore"]
