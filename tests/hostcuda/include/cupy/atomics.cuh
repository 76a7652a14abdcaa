// In the place of CuPy's header of that name: one thread at a time, so that any addition is atomic.
#pragma once

template <class Number, class Other> Number atomicAdd(Number* to, Other value)
{
    Number before = *to;
    *to = before + (Number)value;
    return before;
}
