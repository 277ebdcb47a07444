"""Student, teacher, and the distillation model of both."""
