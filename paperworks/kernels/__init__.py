"""Fast paths behind the same numbers: functions of tensors that know no module."""
