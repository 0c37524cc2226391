"""Distillation: a student learns from a teacher."""

from fastsparse.distill.distiller import Distiller, DistillOutput

__all__ = ["DistillOutput", "Distiller"]
