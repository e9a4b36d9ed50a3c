"""The same endpoints in FastAPI: `sync_app` has functions, which run in threads, and
`async_app` has coroutines, which run in the event loop.

The coroutines leave to a thread what hashes a password or waits for the disk.
"""

import store
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool


class Profile(BaseModel):
    first_name: str = Field(min_length=1)
    last_name: str = Field(min_length=1)
    email: str = Field(min_length=1)


class NewUser(Profile):
    password: str = Field(min_length=1)


class User(Profile):
    id: int
    created_on: str


class Id(BaseModel):
    id: int


sync_app = FastAPI()
async_app = FastAPI()


@sync_app.post("/users/", status_code=201)
def create_user(fields: NewUser) -> Id:
    user_id = store.create_user(**fields.model_dump())
    if user_id is None:
        raise HTTPException(400, "This email is already registered")
    return Id(id=user_id)


@async_app.post("/users/", status_code=201)
async def create_user_in_thread(fields: NewUser) -> Id:
    return await run_in_threadpool(create_user, fields)


@sync_app.get("/users/")
def list_users() -> list[User]:
    return store.list_users()


@async_app.get("/users/")
async def list_users_in_thread() -> list[User]:
    return await run_in_threadpool(store.list_users)


@sync_app.get("/users/{user_id}/")
def get_user(user_id: int) -> User:
    user = store.get_user(user_id)
    if user is None:
        raise HTTPException(404, "Invalid user id")
    return user


@async_app.get("/users/{user_id}/")
async def get_user_in_loop(user_id: int) -> User:
    return get_user(user_id)


@sync_app.put("/users/{user_id}/")
def update_user(user_id: int, fields: Profile) -> Id:
    if store.update_user(user_id, **fields.model_dump()) is None:
        raise HTTPException(400, "This email is already registered")
    return Id(id=user_id)


@async_app.put("/users/{user_id}/")
async def update_user_in_thread(user_id: int, fields: Profile) -> Id:
    return await run_in_threadpool(update_user, user_id, fields)


@sync_app.delete("/users/{user_id}/", status_code=204)
def delete_user(user_id: int) -> None:
    store.delete_user(user_id)


@async_app.delete("/users/{user_id}/", status_code=204)
async def delete_user_in_thread(user_id: int) -> None:
    await run_in_threadpool(store.delete_user, user_id)
