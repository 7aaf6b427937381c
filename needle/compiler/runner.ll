; The native runner of runtime.py, which puts indices for `table.field` (its TABLES) and expands
;
;     %x = word job.n                       load i64 from %job + index
;     %x = pointer job.table                load ptr
;     %x = address state.count              no load
;     set job.stop = i64 %reason            store
;     if eq i64 %a, %b then this else that  icmp and br
;
; A block without an end goes on with the next one.

declare i32 @PyErr_BadArgument()
declare ptr @PyErr_Occurred()
declare void @PyEval_RestoreThread(ptr)
declare ptr @PyEval_SaveThread()
declare i64 @PyLong_AsUnsignedLongLongMask(ptr)
declare ptr @PyLong_FromLongLong(i64)
declare ptr @PyObject_CallNoArgs(ptr)
declare i32 @PyObject_IsTrue(ptr)
declare ptr @Py_BuildValue(ptr, ...)
declare void @Py_DecRef(ptr)
declare i64 @llvm.umax.i64(i64, i64)
declare i64 @llvm.umin.i64(i64, i64)
declare i32 @pthread_cond_broadcast(ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i64 @pthread_self()
declare i32 @sched_yield()
@format = private constant [5 x i8] c"(LL)\00"

; A barrier. The last thread to arrive decides for all whether to stop, since a fast thread may
; already fail a check of the next launch when a slow one looks; and moves what a loop moves.
define internal void @meet(ptr %state, ptr %job, i1 %check, ptr %loop) {
entry:
  %n = word job.n
  %alone = icmp eq i64 %n, 1
  %count = address state.count
  %phase = address state.phase
  br i1 %alone, label %decide, label %arrive
arrive:
  %old = load atomic i64, ptr %phase acquire, align 8
  %before = atomicrmw add ptr %count, i64 1 acq_rel
  %arrived = add i64 %before, 1
  if eq i64 %arrived, %n then decide else spin
decide:
  %this = phi i64 [0, %entry], [%old, %arrive]
  br i1 %check, label %look, label %stop
look:
  %found = call i64 @look(ptr %job)
stop:
  %flag = phi i64 [0, %decide], [%found, %look]
  %failed = word job.failed
  %reason = or i64 %failed, %flag
  set job.stop = i64 %reason
  if eq ptr %loop, null then moved else turn
turn:
  call void @turn(ptr %loop)
moved:
  br i1 %alone, label %out, label %release
release:
  store atomic i64 0, ptr %count monotonic, align 8
  %next = add i64 %this, 1
  store atomic i64 %next, ptr %phase release, align 8
  br label %out
spin:
  %spins = phi i64 [0, %arrive], [%more, %wait], [%more, %yield]
  %now = load atomic i64, ptr %phase acquire, align 8
  if eq i64 %now, %old then wait else out
wait:
  call void @pause()
  %more = add i64 %spins, 1
  if ugt i64 %more, PATIENCE then yield else spin
yield:
  call i32 @sched_yield()
  br label %spin
out:
  ret void
}

; The lowest number of a failed check, plus 1, or 0; where several threads have it, the first one's.
; And all floating-point exceptions that threads have noted.
define internal i64 @look(ptr %job) {
entry:
  %table = pointer job.table
  %n = word job.n
each:
  %thread = phi i64 [0, %entry], [%next, %after]
  %best = phi i64 [0, %entry], [%better, %after]
  %before = phi i64 [0, %entry], [%raised, %after]
  %at = getelementptr ptr, ptr %table, i64 %thread
  %scratch = load ptr, ptr %at
  %flag = load i64, ptr %scratch
  %number = sub i64 %flag, 1
  %limit = sub i64 %best, 1
  if ult i64 %number, %limit then keep else after
keep:
  %second = getelementptr i64, ptr %scratch, i64 1
  %index = load i64, ptr %second
  set job.index = i64 %index
after:
  %better = phi i64 [%best, %each], [%flag, %keep]
  %third = getelementptr i64, ptr %scratch, i64 2
  %noted = load i64, ptr %third
  %raised = or i64 %before, %noted
  %next = add i64 %thread, 1
  if eq i64 %next, %n then out else each
out:
  set job.flag = i64 %better
  set job.raised = i64 %raised
  ret i64 %better
}

; The end of a loop's turn: whether there is another one, for which addresses among the arguments
; move on, else back to where the loop began.
define internal void @turn(ptr %launch) {
entry:
  %moves = pointer launch.args
  %turns = word launch.units
  %count = word launch.grain
  %turn = word launch.turn
  %next = add i64 %turn, 1
  %more = icmp ult i64 %next, %turns
  %after = select i1 %more, i64 %next, i64 0
  %again = zext i1 %more to i64
  %odd = and i64 %turn, 1
  set launch.turn = i64 %after
  set launch.again = i64 %again
each:
  %i = phi i64 [0, %entry], [%i1, %one]
  if uge i64 %i, %count then out else one
one:
  %at = mul i64 %i, 4
  %move = getelementptr i64, ptr %moves, i64 %at
  %slot = pointer move.slot
  %stride = word move.stride
  %flips = word move.flips
  %reset = word move.reset
  %back = and i64 %odd, %flips
  %returns = icmp ne i64 %back, 0
  %negative = sub i64 0, %stride
  %step = select i1 %returns, i64 %negative, i64 %stride
  %way = select i1 %more, i64 %step, i64 %reset
  %old = load i64, ptr %slot
  %new = add i64 %old, %way
  store i64 %new, ptr %slot
  %i1 = add i64 %i, 1
  br label %each
out:
  ret void
}

; One thread's part of a program: of every launch its range of the units. A launch that ends a loop
; goes back to the loop's first one.
define internal void @share(ptr %state, ptr %job, i64 %thread) {
entry:
  %program = pointer job.program
  %table = pointer job.table
  %n = word job.n
  %at = getelementptr ptr, ptr %table, i64 %thread
  %scratch = load ptr, ptr %at
  store i64 0, ptr %scratch
  %third = getelementptr i64, ptr %scratch, i64 2
  store i64 0, ptr %third
  %launches = word program.launches
  %first = address program.first
next:
  %i = phi i64 [0, %entry], [%i1, %run], [%i1, %units], [%i1, %host], [%i1, %call], [%to_i, %jump]
  %i1 = add i64 %i, 1
  if uge i64 %i, %launches then out else begin
begin:
  %offset = mul i64 %i, 8
  %launch = getelementptr i64, ptr %first, i64 %offset
  %kernel = pointer launch.kernel
  %flags = word launch.flags
  %barrier = and i64 %flags, BARRIER
  if eq i64 %barrier, 0 then kind else meet
meet:
  %check = and i64 %flags, CHECK
  %checks = icmp ne i64 %check, 0
  %turns = and i64 %flags, LOOP
  %ends = icmp ne i64 %turns, 0
  %loop = select i1 %ends, ptr %launch, ptr null
  call void @meet(ptr %state, ptr %job, i1 %checks, ptr %loop)
  %stop = word job.stop
  if ne i64 %stop, 0 then out else ahead
ahead:
  br i1 %ends, label %jump, label %kind
jump:
  %back = word launch.kernel
  %again = word launch.again
  %way = mul i64 %back, %again
  %to_i = sub i64 %i1, %way
  br label %next
kind:
  %python = and i64 %flags, HOST
  if eq i64 %python, 0 then units else host
host:
  if eq i64 %thread, 0 then call else next
call:
  call void @note(ptr %third)
  %made = call i64 @host(ptr %job, ptr %kernel)
  call i64 @enter_mode()
  %known = load i64, ptr %third
  %more = or i64 %known, %made
  store i64 %more, ptr %third
  br label %next
units:
  %args = pointer launch.args
  %count = word launch.units
  %grain = word launch.grain
  %rotation = word launch.rotation
  %most = udiv i64 %count, %grain
  %some = call i64 @llvm.umax.i64(i64 %most, i64 1)
  %used = call i64 @llvm.umin.i64(i64 %some, i64 %n)
  %turned = add i64 %thread, %rotation
  %free = urem i64 %turned, %n
  %full = icmp eq i64 %used, %n
  %place = select i1 %full, i64 %thread, i64 %free
  %each = udiv i64 %count, %used
  %rest = urem i64 %count, %used
  %lower = mul i64 %each, %place
  %extra = call i64 @llvm.umin.i64(i64 %place, i64 %rest)
  %from = add i64 %lower, %extra
  %longer = icmp ult i64 %place, %rest
  %one = zext i1 %longer to i64
  %length = add i64 %each, %one
  %to = add i64 %from, %length
  %takes_part = icmp ult i64 %place, %used
  %not_empty = icmp ne i64 %length, 0
  %runs = and i1 %takes_part, %not_empty
  br i1 %runs, label %run, label %next
run:
  call void %kernel(ptr %args, i64 %from, i64 %to, ptr %scratch)
  br label %next
out:
  call void @note(ptr %third)
  ret void
}

; Add the floating-point exceptions that this thread has raised since it entered its mode.
define internal void @note(ptr %noted) {
  %before = load i64, ptr %noted
  %now = call i64 @raised()
  %all = or i64 %before, %now
  store i64 %all, ptr %noted
  ret void
}

; A call into Python, by the thread that entered the program; python: its state while it is away
; from Python, or null. An error stays in that state, and ends the program at the next barrier.
; All ones where it returns True: what Python raises is unknown, but it made a NaN or an infinity.
define internal i64 @host(ptr %job, ptr %function) {
entry:
  %thread = pointer job.python
  %held = icmp eq ptr %thread, null
  br i1 %held, label %call, label %acquire
acquire:
  call void @PyEval_RestoreThread(ptr %thread)
call:
  %result = call ptr @PyObject_CallNoArgs(ptr %function)
  if eq ptr %result, null then fail else drop
fail:
  set job.failed = i64 1
  br label %after
drop:
  %truth = call i32 @PyObject_IsTrue(ptr %result)
  %wide = sext i32 %truth to i64
  %odd = sub i64 0, %wide
  call void @Py_DecRef(ptr %result)
after:
  %made = phi i64 [0, %fail], [%odd, %drop]
  br i1 %held, label %out, label %give
give:
  %again = call ptr @PyEval_SaveThread()
out:
  ret i64 %made
}

; A worker's life. It counts itself a sleeper before it looks at the ticket for the last time, and a
; caller writes the ticket before it looks for sleepers: one of them sees the other. A system may put
; it beside its caller, on one processor, and leave it there for long: it steps aside.
define void @worker(ptr %state, i64 %thread, i64 %first) {
entry:
  %mode = call i64 @enter_mode()
  %ticket = address state.ticket
  %sleepers = address state.sleepers
  %mutex = address state.mutex
  %condition = address state.condition
begin:
  %old = phi i64 [%first, %entry], [%new, %choose], [%new, %work]
spin:
  %spins = phi i64 [0, %begin], [%more, %wait]
  %now = load atomic i64, ptr %ticket acquire, align 8
  if eq i64 %now, %old then wait else awake
wait:
  call void @pause()
  %more = add i64 %spins, 1
  if ugt i64 %more, SPINS then lie_down else spin
lie_down:
  call i32 @pthread_mutex_lock(ptr %mutex)
  atomicrmw add ptr %sleepers, i64 1 seq_cst
sleep:
  %last = load atomic i64, ptr %ticket seq_cst, align 8
  if eq i64 %last, %old then doze else get_up
doze:
  call i32 @pthread_cond_wait(ptr %condition, ptr %mutex)
  br label %sleep
get_up:
  atomicrmw sub ptr %sleepers, i64 1 seq_cst
  call i32 @pthread_mutex_unlock(ptr %mutex)
awake:
  %new = phi i64 [%now, %spin], [%last, %get_up]
  %here = call i64 @processor()
  %caller = word state.processor
  if eq i64 %here, %caller then aside else count
aside:
  call void @step_aside(i64 %here)
count:
  %n = and i64 %new, 65535
  if eq i64 %n, STOP then out else choose
choose:
  if ult i64 %thread, %n then work else begin
work:
  call i64 @enter_mode()
  %job = pointer state.job
  call void @share(ptr %state, ptr %job, i64 %thread)
  call void @meet(ptr %state, ptr %job, i1 false, ptr null)
  br label %begin
out:
  call void @leave_mode(i64 %mode)
  ret void
}

; A caller's run of a program. One that is small, or that a host call started on the thread that
; holds the pool, runs on that thread alone. Returns which of the `told` exceptions were raised.
define internal ptr @execute(ptr %state, ptr %program, ptr %externals, i64 %told) {
entry:
  %job = alloca [16 x i64]
  set job.program = ptr %program
  set job.failed = i64 0
  set job.python = ptr null
  %small = word program.small
  %is_small = icmp ne i64 %small, 0
  %self = call i64 @pthread_self()
  %owner_at = address state.owner
  %owner = load atomic i64, ptr %owner_at monotonic, align 8
  %nested = icmp eq i64 %owner, %self
  %direct = or i1 %is_small, %nested
  br i1 %direct, label %alone, label %count
alone:
  %own = address state.own
  set job.table = ptr %own
  set job.n = i64 1
  call void @work(ptr %state, ptr %job, ptr %externals)
  br label %report
count:
  %useful = word program.useful
  %threads = word state.threads
  %now = word state.present
  %wanted = call i64 @llvm.umin.i64(i64 %useful, i64 %threads)
  if ult i64 %now, %wanted then start else pool
start:
  %starter = pointer state.start
  %started = call ptr @PyObject_CallNoArgs(ptr %starter)
  if eq ptr %started, null then error else ready
ready:
  call void @Py_DecRef(ptr %started)
pool:
  %python = call ptr @PyEval_SaveThread()
  %lock = address state.lock
  call i32 @pthread_mutex_lock(ptr %lock)
  store atomic i64 %self, ptr %owner_at monotonic, align 8
  %present = word state.present
  %n = call i64 @llvm.umin.i64(i64 %useful, i64 %present)
  %table = pointer state.table
  set job.table = ptr %table
  set job.n = i64 %n
  set job.python = ptr %python
  call void @work(ptr %state, ptr %job, ptr %externals)
  store atomic i64 0, ptr %owner_at monotonic, align 8
  call i32 @pthread_mutex_unlock(ptr %lock)
  call void @PyEval_RestoreThread(ptr %python)
report:
  %failed = word job.failed
  if ne i64 %failed, 0 then error else checks
checks:
  %flag = word job.flag
  if eq i64 %flag, 0 then zero else tell
zero:
  %raised = word job.raised
  %some = and i64 %raised, %told
  %result = call ptr @PyLong_FromLongLong(i64 %some)
  ret ptr %result
tell:
  %number = sub i64 %flag, 1
  %index = word job.index
  %pair = call ptr (ptr, ...) @Py_BuildValue(ptr @format, i64 %number, i64 %index)
  ret ptr %pair
error:
  ret ptr null
}

; The caller's share, with the workers called in. Where they sleep, work that is done before they are
; awake is the caller's alone; they get up for what may follow.
define internal void @work(ptr %state, ptr %job, ptr %externals) {
entry:
  %mode = call i64 @enter_mode()
  %program = pointer job.program
  call void @fill(ptr %program, ptr %externals)
  %n = word job.n
  %sleepers = address state.sleepers
  %before = load atomic i64, ptr %sleepers monotonic, align 8
  if eq i64 %n, 1 then run else look
look:
  %amount = word program.amount
  %little = icmp ult i64 %amount, LITTLE
  %absent = icmp ne i64 %before, 0
  %shrinks = and i1 %little, %absent
  %threads = select i1 %shrinks, i64 1, i64 %n
  set job.n = i64 %threads
  set state.job = ptr %job
  %here = call i64 @processor()
  set state.processor = i64 %here
  %ticket = address state.ticket
  %old = load i64, ptr %ticket
  %number = lshr i64 %old, 16
  %more = add i64 %number, 1
  %high = shl i64 %more, 16
  %new = or i64 %high, %threads
  store atomic i64 %new, ptr %ticket seq_cst, align 8
  %asleep = load atomic i64, ptr %sleepers seq_cst, align 8
  if eq i64 %asleep, 0 then run else wake
wake:
  %mutex = address state.mutex
  %condition = address state.condition
  call i32 @pthread_mutex_lock(ptr %mutex)
  call i32 @pthread_cond_broadcast(ptr %condition)
  call i32 @pthread_mutex_unlock(ptr %mutex)
run:
  call void @share(ptr %state, ptr %job, i64 0)
  call void @meet(ptr %state, ptr %job, i1 false, ptr null)
  %flag = call i64 @look(ptr %job)
  call void @leave_mode(i64 %mode)
  ret void
}

; Pointers from outside into the args blocks; and what a run may have left, as at first.
define internal void @fill(ptr %program, ptr %externals) {
entry:
  %patches = word program.patches
  %first = pointer program.first_patch
each:
  %i = phi i64 [0, %entry], [%next, %set]
  if uge i64 %i, %patches then out else one
one:
  %at = mul i64 %i, 3
  %patch = getelementptr i64, ptr %first, i64 %at
  %slot = pointer patch.slot
  %external = word patch.external
  %offset = word patch.offset
  if eq i64 %external, -1 then set else find
find:
  %from = getelementptr i64, ptr %externals, i64 %external
  %given = load i64, ptr %from
set:
  %base = phi i64 [0, %one], [%given, %find]
  %pointer = add i64 %base, %offset
  store i64 %pointer, ptr %slot
  %next = add i64 %i, 1
  br label %each
out:
  ret void
}

; Python's ints as words; not null where one is no int.
define internal ptr @unpack(ptr %args, i64 %count, ptr %words) {
entry:
each:
  %i = phi i64 [0, %entry], [%next, %one]
  if uge i64 %i, %count then out else one
one:
  %from = getelementptr ptr, ptr %args, i64 %i
  %object = load ptr, ptr %from
  %word = call i64 @PyLong_AsUnsignedLongLongMask(ptr %object)
  %to = getelementptr i64, ptr %words, i64 %i
  store i64 %word, ptr %to
  %next = add i64 %i, 1
  br label %each
out:
  %error = call ptr @PyErr_Occurred()
  ret ptr %error
}

; launch(kernel, units, grain, *slots): a program of one launch, on the stack. self: the state.
define ptr @launch(ptr %self, ptr %args, i64 %count) {
entry:
  if uge i64 %count, 3 then read else refuse
refuse:
  call i32 @PyErr_BadArgument()
  ret ptr null
read:
  %base = call i64 @PyLong_AsUnsignedLongLongMask(ptr %self)
  %state = inttoptr i64 %base to ptr
  %words = alloca i64, i64 %count
  %error = call ptr @unpack(ptr %args, i64 %count, ptr %words)
  if ne ptr %error, null then fail else build
fail:
  ret ptr null
build:
  %kernel = load i64, ptr %words
  %second = getelementptr i64, ptr %words, i64 1
  %units = load i64, ptr %second
  %third = getelementptr i64, ptr %words, i64 2
  %grain = load i64, ptr %third
  %slots = getelementptr i64, ptr %words, i64 3
  %program = alloca [16 x i64]
  %useful = udiv i64 %units, %grain
  %is_small = icmp ult i64 %useful, 2
  %small = zext i1 %is_small to i64
  set program.launches = i64 1
  set program.small = i64 %small
  set program.useful = i64 %useful
  set program.amount = i64 %useful
  set program.patches = i64 0
  %launch = address program.first
  set launch.kernel = i64 %kernel
  set launch.args = ptr %slots
  set launch.units = i64 %units
  set launch.grain = i64 %grain
  set launch.rotation = i64 0
  set launch.flags = i64 0
  %result = call ptr @execute(ptr %state, ptr %program, ptr null, i64 0)
  ret ptr %result
}

; run(*pointers). self: the program.
define ptr @run(ptr %self, ptr %args, i64 %count) {
  %result = call ptr @call(ptr %self, ptr %args, i64 %count, i64 0)
  ret ptr %result
}

; The same, which tells of floating-point exceptions.
define ptr @watch(ptr %self, ptr %args, i64 %count) {
  %result = call ptr @call(ptr %self, ptr %args, i64 %count, i64 -1)
  ret ptr %result
}

define internal ptr @call(ptr %self, ptr %args, i64 %count, i64 %told) {
entry:
  %base = call i64 @PyLong_AsUnsignedLongLongMask(ptr %self)
  %program = inttoptr i64 %base to ptr
  %externals = word program.externals
  if eq i64 %count, %externals then read else refuse
refuse:
  call i32 @PyErr_BadArgument()
  ret ptr null
read:
  %words = alloca i64, i64 %count
  %error = call ptr @unpack(ptr %args, i64 %count, ptr %words)
  if ne ptr %error, null then fail else go
fail:
  ret ptr null
go:
  %state = pointer program.state
  %result = call ptr @execute(ptr %state, ptr %program, ptr %words, i64 %told)
  ret ptr %result
}
